"""Scenes of handwriting: deterministic, apart by picture, answers that are true and balanced."""

import collections

import numpy as np
import pytest

from mmjax.data import digits
from mmjax.data.digits import KINDS, QUARTERS, DigitScenes
from mmjax.data.images import BrokenImage
from mmjax.data.messages import images, text, validated
from mmjax.errors import UserError


def asked(sample):
    return text(sample.messages[0]), sample.answers[0]


def test_a_sample_depends_on_seed_split_and_index_alone():
    one, other = DigitScenes(size=50), DigitScenes(size=9999)
    assert one[7] == other[7]
    name = images(one[7].messages)[0]["path"]
    assert np.array_equal(one.image(name), other.image(name))
    assert not np.array_equal(DigitScenes(size=50, seed=1).image(name), one.image(name))


def test_no_handwriting_is_in_both_splits():
    train, held_out = (
        {picture.tobytes() for pictures in digits.handwriting(split).values() for picture in pictures}
        for split in ("train", "held_out")
    )
    # A few of the pictures are equal to one another, to the last grey value.
    assert 1480 < len(train) <= 1500 and 290 < len(held_out) <= 297
    assert len(train & held_out) <= 1
    assert {split: sum(map(len, digits.handwriting(split).values())) for split in digits.SPLITS} == digits.SPLITS


def test_pictures_are_rgb_and_show_digits_where_the_scene_has_them():
    scenes = DigitScenes("held_out", "caption", size=40)
    for i in range(40):
        sample = scenes[i]
        picture = np.asarray(scenes.image(images(sample.messages)[0]["path"]))
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        for number, quarter in enumerate(QUARTERS):
            top, left = 16 * (number // 2), 16 * (number % 2)
            assert (picture[top : top + 16, left : left + 16].max() > 60) == (quarter in sample.answers[0])


@pytest.mark.parametrize("split", digits.SPLITS)
def test_answers_are_true(split):
    facts = DigitScenes(split, "facts", size=700)
    kinds = collections.Counter()
    for i in range(len(facts)):
        sample = facts[i]
        (scene, question), answer = asked(sample)[0].split("\n"), sample.answers[0]
        shown = {quarter: int(word) for quarter, word in zip(QUARTERS, scene.split()) if word != "empty"}
        values = list(shown.values())
        expected = {
            "position": lambda: str(shown[question.removeprefix("Which digit is at the ").rstrip("?")]),
            "count": lambda: str(len(values)),
            "contains": lambda: "yes" if int(question[-2]) in values else "no",
            "largest": lambda: str(max(values)),
            "sum": lambda: str(sum(values)),
            "order": lambda: " ".join(map(str, values)),
            "caption": lambda: ", ".join(f"{quarter} {digit}" for quarter, digit in shown.items()),
        }[sample.kind]()
        assert answer == expected
        assert 1 <= len(shown) <= 4 and len(scene.split()) == 4
        kinds[sample.kind] += 1
    assert kinds == dict.fromkeys((*KINDS, "caption"), 100)


def test_guessing_without_the_picture_stays_weak():
    questions = DigitScenes("train", "questions", size=6000)
    answers = {kind: collections.Counter() for kind in KINDS}
    present = collections.defaultdict(list)
    for i in range(len(questions)):
        question, answer = asked(questions[i])
        answers[questions[i].kind][answer] += 1
        if questions[i].kind == "contains":
            present[question].append(answer == "yes")
    best = {kind: count.most_common(1)[0][1] / 1000 for kind, count in answers.items()}
    assert sum(best[kind] for kind in KINDS if kind != "sum") / 5 < 0.3
    assert best["contains"] < 0.55 and best["position"] < 0.14 and best["count"] < 0.3
    assert all(0.3 < np.mean(values) < 0.7 for values in present.values())  # no digit gives its answer away


def test_single_digits_carry_their_class_and_stand_among_scribbles():
    singles = DigitScenes("train", "single", size=300)
    scenes = [singles._scene(i)[1] for i in range(300)]
    assert all(sum(digit >= 0 for digit in scene.values()) == 1 for scene in scenes)
    assert collections.Counter(map(len, scenes)).keys() == {1, 2, 3, 4}
    classes = collections.Counter(singles[i].answers[0] for i in range(300))
    assert set(classes) == set(singles.classes) and min(classes.values()) > 10


def test_messages_are_what_the_house_takes():
    for task in digits.TASKS:
        sample = DigitScenes(task=task, size=3)[1]
        assert sample.messages == validated(sample.messages)
        assert bool(images(sample.messages)) == (task != "facts")


def test_mistakes_are_named():
    with pytest.raises(UserError, match="unknown split 'test'; there are train, held_out"):
        DigitScenes(split="test")
    with pytest.raises(UserError, match="unknown kind of question 'colour'"):
        DigitScenes(kinds=("colour",))
    with pytest.raises(BrokenImage, match="no picture named 'held_out-000001.png'"):
        DigitScenes(size=5).image("held_out-000001.png")
    with pytest.raises(IndexError):
        DigitScenes(size=5)[5]


def test_several_pictures_of_a_sample():
    dataset = DigitScenes("held_out", "questions", size=60, pictures=3)
    one = DigitScenes("held_out", "questions", size=180)
    asked = set()
    for index in range(60):
        sample = dataset[index]
        shown = images(sample.messages)
        number = int(text(sample.messages[0]).split(":")[0].removeprefix("In picture "))
        asked.add(number)
        assert len({part["path"] for part in shown}) == 3 and dataset[index] == sample
        scene = one._scene(3 * index + number - 1)[1]
        if sample.kind == "order":
            assert sample.answers == (" ".join(map(str, scene.values())),)
        assert dataset.image(shown[0]["path"]).tobytes() == one.image(shown[0]["path"]).tobytes()
    assert asked == {1, 2, 3}
    document = DigitScenes("train", "caption", size=4, pictures=2)[3].messages
    assert [message["role"] for message in document] == ["assistant"] and len(images(document)) == 2
    assert [part["type"] for part in document[0]["content"]] == ["image", "text"] * 2
    with pytest.raises(BrokenImage):
        dataset.image("held_out-000180.png")
    with pytest.raises(UserError, match="3 pictures are not for the task 'single'"):
        DigitScenes(task="single", pictures=3)
