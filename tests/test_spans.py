import numpy as np

from mmjax.spans import spans_of

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
MEDIA = np.array([[0, 0, 1, 1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0, 0]], bool)
SUPERVISED = np.array([[0, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0, 0, 0]], bool)


def spans(mask):
    return spans_of(mask, SEGMENTS, MEDIA, SUPERVISED)


def test_a_causal_mask_has_none():
    assert spans("causal") is None


def test_a_run_of_media_is_a_span_and_ends_with_its_sample():
    assert spans("media").tolist() == [[0, 0, 1, 1, 2, 0, 3, 0, 0], [1, 1, 0, 2, 0, 0, 0, 0, 0]]


def test_a_prefix_ends_where_the_first_supervised_token_is_predicted():
    """Of a sample without any, all is prompt; what stands behind an answer is causal."""
    assert spans("prefix").tolist() == [[1, 1, 0, 0, 2, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_an_opening_is_the_first_image_and_what_stands_in_front_of_it():
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0]])
    is_media = np.array([[0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0]], bool)
    spans = spans_of("opening", segments, is_media, np.zeros_like(is_media))
    assert spans.tolist() == [[1, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0]]
