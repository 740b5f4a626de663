"""Word error rates by hand."""

import pytest

from mmjax.evaluation.word_errors import distance, plain, word_error_rate


@pytest.mark.parametrize(
    "written, said, errors",
    [
        ("the cat sat", "the cat sat", 0),
        ("the cat sits", "the cat sat", 1),  # exchanged
        ("cat sat", "the cat sat", 1),  # left out
        ("the the cat sat", "the cat sat", 1),  # put in
        ("", "the cat sat", 3),
        ("a b c", "", 3),
        ("sat cat the", "the cat sat", 2),
        ("x the cat y sat", "the cat sat down", 3),
    ],
)
def test_the_least_number_of_changes(written, said, errors):
    assert distance(written.split(), said.split()) == errors


def test_all_sentences_count_by_their_words():
    assert word_error_rate(["a b", "c"], ["a b", "c d e f"]) == 3 / 6
    assert plain("It's fine, isn't it? Well-done.") == "its fine isnt it welldone"
    with pytest.raises(ValueError, match="nothing was said"):
        word_error_rate([""], [""])
