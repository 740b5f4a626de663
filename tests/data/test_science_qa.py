import json

import numpy as np
import pytest
from PIL import Image

from mmjax.config import Source
from mmjax.data import sources, templates
from mmjax.data.messages import BadSample
from mmjax.errors import UserError
from mmjax.evaluation import answers

PROBLEM = {
    "question": "Which  is heavier?",
    "choices": ["a stone", "a feather"],
    "answer": 1,
    "hint": "",
    "lecture": "Weight is a force.\nIt pulls.",
    "solution": "Look at it.",
    "image": "image.png",
    "subject": "natural science",
}


@pytest.fixture
def folder(tmp_path):
    problems = {"1": PROBLEM, "2": {**PROBLEM, "hint": "On the moon.", "image": None, "lecture": "", "solution": ""}, "3": {"question": "?"}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1", "2", "3", "4"], "test": ["2"]}))
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"1": "A stone lies there."}}))
    picture = tmp_path / "images" / "train" / "1" / "image.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((8, 6, 3), 90, np.uint8)).save(picture)
    return tmp_path


def opened(folder, **options):
    return sources.open(Source(kind="science_qa", path=str(folder / "problems.json"), images=str(folder / "images"), options=options))


def test_problems_are_written_as_lavin_is_tuned_on_them(folder):
    dataset = opened(folder)
    first, second = dataset[0], dataset[1]
    template = templates.get("lavin")
    segments = template.segments(first.messages)
    assert segments[0].text == "Image: " and segments[1].image == {"type": "image", "path": "train/1/image.png"}
    assert segments[2].text == "Question: Which is heavier?\nContext: N/A\nOptions: (A) a stone (B) a feather\nResponse:"
    assert segments[3].supervised and segments[3].text == "The answer is B. BECAUSE: Weight is a force.\\nIt pulls. Look at it."
    assert dataset.image("train/1/image.png").size == (6, 8) and dataset.picture_size("train/1/image.png") == (8, 6)
    texts = [segment.text for segment in template.segments(second.messages, generation_prompt=True)]
    asked = "Image: N/A Question: Which is heavier?\nContext: On the moon.\nOptions: (A) a stone (B) a feather\nResponse:"
    assert "".join(texts).startswith(asked)
    assert second.kind == "natural science" and second.answers == ("B",)
    captioned = opened(folder, captions=str(folder / "captions.json"), explained=False)[0]
    assert "Context: A stone lies there.\n" in captioned.messages[0]["content"][1]["text"]
    assert captioned.messages[1]["content"][0]["text"] == "The answer is B."


def test_what_is_no_problem_is_said(folder):
    dataset = opened(folder)
    with pytest.raises(BadSample, match="not as ScienceQA's are"):
        dataset[2]
    with pytest.raises(BadSample, match="in no problem"):
        dataset[3]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        opened(folder, split="dev")


@pytest.mark.parametrize(
    ("text", "letter"),
    [("The answer is B. BECAUSE: A is not.", "B"), ("(C)", "C"), ("D", "D"), ("The answer is (A)", "A"), ("A stone", ""), ("", "")],
)
def test_an_answer_is_right_by_its_letter(text, letter):
    assert answers.letter(text) == letter
    assert answers.same_letter(text, ("B",)) == (letter == "B")
