"""The pictures: that they are drawn, and that what they mark is what is supervised."""

import numpy as np
from PIL import Image

from mmjax import drawing
from mmjax.batch import Batch
from mmjax.evaluation.answers import Score


def batch() -> Batch:
    """One row of two samples: [image] 1 2 | 3, and 4 | 5 6, taught after the bar."""
    return Batch(
        tokens=np.array([[0, 0, 1, 2, 3, 4, 5, 6, 0]]),
        segments=np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]]),
        media=np.array([[0, 1, -1, -1, -1, -1, -1, -1, -1]]),
        weights=np.array([[0, 0, 0, 1, 0, 1, 1, 0, 0]], np.float32),
        images=np.zeros((1, 2, 8, 8, 3), np.uint8),
    )


def words(ids: list[int]) -> str:
    return "".join(f"w{i}\n" for i in ids)


def test_supervised_text_is_marked():
    lines, images = drawing._row(batch(), words, tokens_per_tile=2, row=0)
    arrow = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    spans = [span for line in lines for span in line if span[0].strip()]
    assert spans == [
        ("[image]", False),
        (f"w1{arrow}w2{arrow}", False),
        (f"w3{arrow}", True),
        (f"w4{arrow}", False),
        (f"w5{arrow}w6{arrow}", True),
    ]
    assert len(images) == 1


def test_virtual_tokens_are_shown_as_one():
    from dataclasses import replace

    virtual = np.array([[-1, -1, 0, 1, -1, 0, 1, -1, -1]])
    lines, _ = drawing._row(replace(batch(), virtual=virtual), words, tokens_per_tile=2, row=0)
    assert [text.strip() for line in lines for text, _ in line if "[" in text] == ["[image]", "[prompt]", "[prompt]"]


def test_long_text_is_broken_at_spaces():
    lines = drawing._lines([("aaaa " * 40, False), ("b" * 250, True)])
    assert all(sum(len(text) for text, _ in line) <= drawing.COLUMNS for line in lines)
    assert "".join(text for line in lines for text, _ in line).replace(" ", "") == "aaaa" * 40 + "b" * 250
    assert {marked for line in lines for text, marked in line if "b" in text} == {True}


def test_every_picture_is_drawn(tmp_path):
    drawing.first_batch(tmp_path / "batch.png", batch(), words, 2)
    tiles = Batch(images=np.zeros((2, 3, 8, 8, 3), np.uint8), classes=np.array([[1, 2, 3], [4, 5, -1]]))
    drawing.first_batch(tmp_path / "tiles.png", tiles, words, 0)
    metrics = [{"stage": "a", "step": i, "loss": 1 / i} for i in range(1, 9)]
    drawing.losses(tmp_path / "losses.png", [*metrics, {"stage": "b", "step": 4, "loss": 2.0, "validation_loss": 0.5}])
    scores = {"all": Score(9, 10), "count": Score(0, 0)}
    drawing.results(tmp_path / "results.png", scores, {"all": Score(1, 10)})
    picture = Image.new("RGB", (40, 20))
    answers = [
        drawing.Answer("Cost in $ or $$?", "$5", "$5", True, picture),
        drawing.Answer("Where?", "a " * 200, "b " * 200),
    ]
    drawing.sample_answers(tmp_path / "answers.png", answers)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as drawn:
            assert min(drawn.size) > 100 and len(drawn.convert("L").getcolors()) > 2, path
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_nothing_to_draw_draws_nothing(tmp_path):
    drawing.losses(tmp_path / "losses.png", [])
    drawing.sample_answers(tmp_path / "answers.png", [])
    assert not list(tmp_path.iterdir())
