"""Answers: normalisation, intervals, kinds; the blind twin's three ways."""

import math

import pytest

from mmjax.data.messages import Sample, images
from mmjax.evaluation.answers import Score, by_kind, is_right, normalise, total
from mmjax.evaluation.blind import most_frequent, shuffled, withheld


@pytest.mark.parametrize(
    "text, expected",
    [
        (" The  Dog. ", "dog"),
        ("Seven", "7"),
        ("3, 7 and one!", "3 7 and 1"),
        ("3.5", "3.5"),
        ("A", "a"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise(text) == expected


def test_right_means_equal_to_any_accepted_answer():
    assert is_right("yes.", ("Yes", "yeah"))
    assert not is_right("yes it is", ("yes",))
    assert not is_right("", ("no",)) and not is_right("no", ())


def test_wilson_interval_by_hand():
    # 8 of 10: (0.8 + z2/20 +- z sqrt(0.016 + z2/400)) / (1 + z2/10)
    z2 = 1.959964**2
    low, high = Score(8, 10).interval
    half = math.sqrt(z2) * math.sqrt(0.016 + z2 / 400)
    assert low == pytest.approx((0.8 + z2 / 20 - half) / (1 + z2 / 10))
    assert high == pytest.approx((0.8 + z2 / 20 + half) / (1 + z2 / 10))
    assert Score(0, 20).interval[0] == 0 and Score(20, 20).interval[1] == pytest.approx(1)
    assert Score(0, 0).interval == (0, 1) and math.isnan(Score(0, 0).share)


def test_kinds_are_counted_and_some_left_apart():
    scores = by_kind(["a", "b", "a", "sum"], [True, False, False, True])
    assert scores == {"a": Score(1, 2), "b": Score(0, 1), "sum": Score(1, 1)}
    assert total(scores) == Score(2, 4) and total(scores, apart=("sum",)) == Score(1, 3)


def sample(name, *paths, kind="", answer="yes"):
    content = [{"type": "image", "path": path} for path in paths] + [{"type": "text", "text": "Well?"}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Sample(name, said, kind, (answer,))


def test_shuffled_images_are_never_ones_own():
    samples = [sample("0", "a"), sample("1", "b"), sample("2", "a"), sample("3"), sample("4", "c", "b")]
    replaced = {}
    for before, after in zip(samples, shuffled(samples)):
        assert len(images(before.messages)) == len(images(after.messages)) and before.answers == after.answers
        for one, other in zip(images(before.messages), images(after.messages)):
            assert one["path"] != other["path"]
            assert replaced.setdefault(one["path"], other["path"]) == other["path"]
    assert set(replaced.values()) == {"a", "b", "c"}
    assert images(samples[0].messages)[0]["path"] == "a"  # the given samples are left as they are
    assert shuffled(samples) == shuffled(samples)


def test_withheld_images_are_gone_and_nothing_else():
    (bare,) = withheld([sample("0", "a")])
    assert bare.messages[0]["content"] == [{"type": "text", "text": "Well?"}]


def test_most_frequent_answer_by_kind():
    training = [
        sample("0", kind="count", answer="3"),
        sample("1", kind="count", answer="2"),
        sample("2", kind="count", answer="3"),
        sample("3", kind="contains", answer="no"),
        sample("4", answer="2"),
        sample("5", answer="2"),
    ]
    assert most_frequent(training) == {"": "2", "count": "3", "contains": "no"}
    assert most_frequent([]) == {}
