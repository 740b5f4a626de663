"""BLEU and CIDEr-D of captions, as the COCO caption evaluation computes them, without Java.

    references = {"photo-1": ["A dog runs.", "A brown dog is running."], ...}
    captions = {"photo-1": "a dog is running", ...}
    bleu(captions, references)      -> (BLEU-1, BLEU-2, BLEU-3, BLEU-4), each 0..1
    cider_d(captions, references)   -> CIDEr-D, 0..10

The one difference to that evaluation is the tokenizer: `tokenize` follows the Penn Treebank rules in what matters for
captions (lower case, clitics apart, punctuation dropped), not the whole of Stanford's tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

ORDER = 4  # n-grams of 1..4 words
SIGMA = 6.0  # of CIDEr-D's length penalty, in words

Gram = tuple[str, ...]

_TOKEN = re.compile(
    r"""
    \w+(?=n't\b) | n't\b | can(?=not\b)    # do n't  can not
  | '(?:s|re|ve|ll|d|m)\b                    # it 's
  | \d+(?:[.,:/]\d+)*\w*                     # 1,000  3.5  10:30  2nd
  | (?:[^\W\d_]\.){2,}                       # u.s.
  | \w+(?:-\w+)*                             # black-and-white
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """The words of a caption: lower case, without punctuation; clitics are words ("isn't" is "is", "n't")."""
    return _TOKEN.findall(text.lower().replace("’", "'"))


def bleu(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> tuple[float, ...]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al., ACL 2002).

    Counts are clipped by the largest count in any one reference and summed over the corpus; the brevity penalty compares
    the summed lengths of the captions with those of the references closest in length (the shorter one of a tie).
    """
    _check(captions, references)
    matched, possible = [0] * ORDER, [0] * ORDER
    length = reference_length = 0
    for name, caption in captions.items():
        words = tokenize(caption)
        texts = [tokenize(reference) for reference in references[name]]
        most: Counter[Gram] = Counter()
        for text in texts:
            most |= _ngrams(text)
        for gram, count in _ngrams(words).items():
            matched[len(gram) - 1] += min(count, most[gram])
        for order in range(1, ORDER + 1):
            possible[order - 1] += max(0, len(words) - order + 1)
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
    tiny, small = 1e-15, 1e-9  # the evaluation's own guards against 0/0, far below any figure that is printed
    penalty = min(1.0, math.exp(1 - (reference_length + small) / (length + tiny)))
    product, scores = 1.0, []
    for order in range(1, ORDER + 1):
        product *= (matched[order - 1] + tiny) / (possible[order - 1] + small)
        scores.append(penalty * product ** (1 / order))
    return tuple(scores)


def cider_d(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726), sigma 6, averaged over the captions.

    An n-gram weighs its count times log(images / images whose references hold it), both from `references`; similarity to
    a reference is the cosine with the caption's counts clipped to the reference's, times a penalty of the difference in
    length (the number of bigrams, as in the evaluation's code); it is averaged over orders and references, times 10.
    """
    _check(captions, references)
    counts = {name: [_ngrams(tokenize(text)) for text in references[name]] for name in captions}
    frequency: Counter[Gram] = Counter()
    for texts in counts.values():
        frequency.update(set().union(*texts))
    rarest = math.log(len(captions))
    total = 0.0
    for name, caption in captions.items():
        candidate = _ngrams(tokenize(caption))
        for reference in counts[name]:
            total += _similarity(candidate, reference, frequency, rarest) / len(counts[name])
    return 10 * total / len(captions)


def _similarity(candidate: Counter[Gram], reference: Counter[Gram], frequency: Counter[Gram], rarest: float) -> float:
    """Mean over the orders of the clipped cosine, times the penalty of the difference in length. 0..1."""
    dot, candidate_norm, reference_norm = [0.0] * ORDER, [0.0] * ORDER, [0.0] * ORDER
    for gram in candidate.keys() | reference.keys():
        order = len(gram) - 1
        weight = (rarest - math.log(max(1, frequency[gram]))) ** 2
        ours, theirs = candidate[gram], reference[gram]
        dot[order] += min(ours, theirs) * theirs * weight
        candidate_norm[order] += ours * ours * weight
        reference_norm[order] += theirs * theirs * weight
    difference = sum(n for gram, n in candidate.items() if len(gram) == 2)
    difference -= sum(n for gram, n in reference.items() if len(gram) == 2)
    norms = [math.sqrt(a * b) for a, b in zip(candidate_norm, reference_norm)]
    cosine = sum(d / norm for d, norm in zip(dot, norms) if norm) / ORDER
    return cosine * math.exp(-(difference**2) / (2 * SIGMA**2))


def _ngrams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(words[i : i + order]) for order in range(1, ORDER + 1) for i in range(len(words) - order + 1))


def _check(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not captions:
        raise ValueError("there are no captions to score")
    if missing := [name for name in captions if not references.get(name)]:
        raise ValueError(f"{len(missing)} of {len(captions)} captions have no reference, the first is {missing[0]!r}")
