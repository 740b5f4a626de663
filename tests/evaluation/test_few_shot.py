"""Examples before a question: how many, which, and never the question's own picture."""

import json

import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax.config import Evaluation, FewShot, Source
from mmjax.data import sources
from mmjax.data.messages import images, text
from mmjax.errors import UserError
from mmjax.evaluation import blind, run
from mmjax.evaluation.few_shot import Examples
from tests import small_workdir
from tests.data.pictures import encoded, write_tar

COLOURS = {"red": (250, 10, 10), "rose": (230, 30, 40), "blue": (10, 20, 240), "sky": (30, 40, 220), "green": (10, 240, 20)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return small_workdir.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(workdir):
    return mmjax.load(workdir)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A source of plain pictures, two captions each, and one with the red and the blue one under other names."""
    folder = tmp_path_factory.mktemp("colours")
    plain = {name: encoded(Image.fromarray(np.full((20, 30, 3), colour, np.uint8))) for name, colour in COLOURS.items()}
    write_tar(folder / "support.tar", {f"{name}.png": picture for name, picture in plain.items()} | {"bad.png": b"x"})
    write_tar(folder / "questions.tar", {"0.png": plain["red"], "1.png": plain["blue"]})
    rows = [{"image": f"{name}.png", "captions": [name, f"a {name}"]} for name in [*plain, "bad"]]
    (folder / "support.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "questions.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png", "captions": ["?"]}) for i in range(2)))
    return [
        Source(kind="captions", path=str(folder / f"{name}.jsonl"), images=str(folder / f"{name}.tar"), options={"prompt": "Output:"})
        for name in ("support", "questions")
    ]


def asked(settings, source, model=None, workdir=None, change=lambda samples: samples):
    dataset = sources.open(source)
    samples = [dataset[i] for i in range(len(dataset))]
    examples = Examples(settings, model, workdir)
    opened = examples.opener(dataset.image)
    for sample in examples.before(change(samples), dataset.image, samples):
        yield sample, [np.asarray(opened(part["path"]))[0, 0].tolist() for part in images(sample.messages)]


def answers(sample):
    """The answers of the examples, without articles."""
    return [text(message).removeprefix("a ") for message in sample.messages[:-1] if message["role"] == "assistant"]


def test_random_examples_have_other_pictures_than_the_question(colours):
    support, questions = colours
    for seed in range(4):
        for number, (sample, pixels) in enumerate(asked(FewShot(shots=3, source=support, seed=seed), questions)):
            own = ("red", "blue")[number]
            assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 4
            assert len(set(answers(sample))) == 3 and not {own, "bad"} & set(answers(sample))
            assert pixels == [list(COLOURS[name]) for name in [*answers(sample), own]]
    again = [list(asked(FewShot(shots=2, source=support, seed=1), questions)) for _ in range(2)]
    assert again[0] == again[1]
    with pytest.raises(UserError, match="5 examples with pictures of their own .* the source has 4"):
        list(asked(FewShot(shots=5, source=support), questions))


def test_similar_examples_come_with_the_likest_last(colours, model, workdir):
    support, questions = colours
    settings = FewShot(shots=2, source=support, choose="similar")
    first, second = [answers(sample) for sample, _ in asked(settings, questions, model, workdir)]
    assert first[-1] == "rose" and second[-1] == "sky"
    assert len(list((workdir / "features").glob("similar-*.npy"))) == 1
    assert [answers(sample) for sample, _ in asked(settings, questions, model, workdir)] == [first, second]
    # The blind twin is shown examples of what it is shown, and still never its own picture.
    for (sample, _), own in zip(asked(settings, questions, model, workdir, blind.shuffled), ("red", "blue")):
        assert answers(sample)[-1] == ("sky" if own == "red" else "rose") and own not in answers(sample)
    assert all(len(answers(sample)) == 2 for sample, _ in asked(settings, questions, model, workdir, blind.withheld))


def test_zero_shot_with_two_examples_in_words(colours):
    support, questions = colours
    for sample, pixels in asked(FewShot(text_only=2, source=support), questions):
        assert len(pixels) == 1 and len(answers(sample)) == 2
        assert [text(message) for message in sample.messages[::2]] == ["Output:"] * 3


def test_an_evaluation_with_shots(model, workdir, monkeypatch):
    given = []

    def answer(model, samples, open_image, **settings):
        for sample in samples:
            given.append(sample)
            assert all(open_image(part["path"]).size == (32, 32) for part in images(sample.messages))
            yield sample, "3"

    monkeypatch.setattr(run, "answer", answer)
    questions = Source(kind="digits", options={"split": "held_out", "size": 6})
    few_shot = FewShot(shots=4, source=Source(kind="digits", options={"size": 40}))
    recipe = type(small_workdir.RECIPE)(evaluations={"q": Evaluation(questions, few_shot=few_shot, blind=True)})
    figures = run.evaluate(None, recipe, workdir)
    assert figures["shots"] == 4 and figures["questions"] == 6
    assert [len(images(sample.messages)) for sample in given] == [5] * 12 + [4] * 6


def test_a_model_is_asked_with_shots(model, workdir):
    questions = Source(kind="digits", options={"split": "held_out", "size": 2, "kinds": ("count",)})
    few_shot = FewShot(shots=1, source=Source(kind="digits", options={"size": 12, "kinds": ("count",)}), choose="similar")
    recipe = type(small_workdir.RECIPE)(evaluations={"q": Evaluation(questions, few_shot=few_shot, max_new_tokens=2, batch=2)})
    assert run.evaluate(model, recipe, workdir)["shots"] == 1
