"""BLEU and CIDEr-D against values worked out by hand and what must hold of them."""

import gzip
import json
import math

import pytest

from mmjax.evaluation.captions import bleu, cider_d, tokenize


def test_tokens():
    assert tokenize("A man, in a T-shirt, isn't here!") == ["a", "man", "in", "a", "t-shirt", "is", "n't", "here"]
    assert tokenize("John’s dog can't; it cannot.") == ["john", "'s", "dog", "ca", "n't", "it", "can", "not"]
    assert tokenize("At 10:30, 1,000 of 'em -- (2nd)...") == ["at", "10:30", "1,000", "of", "em", "2nd"]
    assert tokenize("  ") == []


def test_bleu_by_hand():
    # Papineni's example: "the" seven times; clipped to the two of the first reference.
    scores = bleu({"a": "the the the the the the the"}, {"a": ["the cat is on the mat", "there is a cat on the mat"]})
    assert scores[0] == pytest.approx(2 / 7)
    assert scores[1] == pytest.approx(0, abs=1e-6)

    # 1-grams 4/5, 2-grams 2/4, 3-grams 1/3, 4-grams 0/2; longer than its reference, so no penalty.
    scores = bleu({"a": "a dog runs very fast"}, {"a": ["a dog runs fast"]})
    assert scores[0] == pytest.approx(4 / 5)
    assert scores[1] == pytest.approx(math.sqrt(4 / 5 * 2 / 4))
    assert scores[2] == pytest.approx((4 / 5 * 2 / 4 * 1 / 3) ** (1 / 3))


def test_bleu_penalty_takes_the_closest_reference_and_the_shorter_of_a_tie():
    # 4 words against references of 3 and 5: a tie, so 3, so no penalty.
    assert bleu({"a": "x y z w"}, {"a": ["x y z", "x y z w v"]})[0] == pytest.approx(1)
    # 2 words against 3: exp(1 - 3/2).
    assert bleu({"a": "x y"}, {"a": ["x y z"]})[0] == pytest.approx(math.exp(-0.5))
    # Over the corpus: 2 + 4 words against 3 + 4, all found.
    scores = bleu({"a": "x y", "b": "p q r s"}, {"a": ["x y z"], "b": ["p q r s"]})
    assert scores[0] == pytest.approx(math.exp(1 - 7 / 6))
    assert bleu({"a": ""}, {"a": ["x"]}) == pytest.approx((0, 0, 0, 0), abs=1e-9)


def test_cider_d_by_hand():
    # Two pictures, every n-gram in one of them: each weighs log 2, and that cancels.
    references = {"a": ["one two three four"], "b": ["five six seven eight"]}
    assert cider_d({"a": "one two three four", "b": "five six seven eight"}, references) == pytest.approx(10)
    # "one two": 1-grams 2/sqrt(2 * 4), 2-grams 1/sqrt(1 * 3), nothing longer; two bigrams less.
    cosine = (2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4
    half = cider_d({"a": "one two", "b": ""}, references)
    assert half == pytest.approx(10 * cosine * math.exp(-(2**2) / 72) / 2)
    # A repeated word is clipped: min(2, 1) * 1 over sqrt(4 * 4).
    repeated = cider_d({"a": "one one", "b": ""}, references)
    assert repeated == pytest.approx(10 * (1 / math.sqrt(4 * 4)) / 4 * math.exp(-(2**2) / 72) / 2)


def test_cider_d_ignores_what_every_picture_has():
    references = {"a": ["a cat"], "b": ["a dog"]}
    assert cider_d({"a": "a", "b": "a"}, references) == 0


def test_scores_do_not_depend_on_order_and_are_averages_over_references():
    captions = {"a": "a red cat sits", "b": "two dogs run fast", "c": "the sea at night"}
    references = {
        "a": ["a cat sits down", "the red cat is sitting"],
        "b": ["dogs run", "two brown dogs run fast"],
        "c": ["the dark sea", "waves at night by the sea"],
    }
    backwards = {name: references[name][::-1] for name in reversed(references)}
    assert cider_d(captions, references) == pytest.approx(cider_d(dict(reversed(captions.items())), backwards))
    assert bleu(captions, references) == pytest.approx(bleu(dict(reversed(captions.items())), backwards))
    twice = {name: texts * 2 for name, texts in references.items()}
    assert cider_d(captions, references) == pytest.approx(cider_d(captions, twice))


def test_missing_references_are_an_error():
    with pytest.raises(ValueError, match="1 of 2 captions have no reference, the first is 'b'"):
        bleu({"a": "x", "b": "y"}, {"a": ["x"], "b": []})
    with pytest.raises(ValueError, match="no captions"):
        cider_d({}, {})


def test_known_figures_of_real_captions(data_kit):
    with gzip.open(data_kit / "flickr8k" / "captions_val.jsonl.gz", "rt") as file:
        references = {row["id"]: row["en"] for row in map(json.loads, file)}
    captions = dict.fromkeys(references, "a dog is running through the grass")
    # Published with a tokenizer that parts words at hyphens, hence the tolerance.
    assert [100 * score for score in bleu(captions, references)] == pytest.approx([39.8, 17.7, 9.1, 5.3], abs=0.15)
    assert cider_d(captions, references) == pytest.approx(0.108, abs=5e-4)
