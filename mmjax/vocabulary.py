"""Tokenizers: those of our own, trained on the recipe's texts for language models that begin from nothing, and tokens added to
others.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Sequence

from mmjax.parallel import cluster
from mmjax.preprocessing import has_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
NEWLINE_WORD_OR_MARK = r"\n|[\p{L}\p{M}]+(?:[-'’][\p{L}\p{M}]+)*|\p{N}|[^\s\p{L}\p{M}\p{N}]"


def train(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int = 4096,
    min_frequency: int = 1,
    markers: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`.

    kind      "word": lower-cased words (t-shirt and man's are one), single digits, marks and newlines; white space is
              not kept. "bpe": byte-level pairs (arXiv 1508.07909), which can write anything
    markers   further strings that are to be one token each (those of the chat template)
    The same texts in the same order give the same tokenizer. A text begins with <s> where special tokens are asked
    for.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL, *(marker for marker in markers if marker not in SPECIAL)]
    trainer: trainers.Trainer
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(NEWLINE_WORD_OR_MARK), "removed", invert=True)
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=special)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        raise ValueError(f"unknown kind of tokenizer {kind!r}; there are word and bpe")
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[token for token in special if token not in SPECIAL[:4]],
        clean_up_tokenization_spaces=False,
    )


def train_once(directory: Path, texts: Iterable[str], **settings) -> PreTrainedTokenizerFast:
    """The tokenizer of `directory`, trained and saved there if it is not there yet."""
    from mmjax.preprocessing import has_tokenizer, read_tokenizer

    with cluster.first_alone("tokenizer"):
        if not has_tokenizer(directory):
            train(texts, **settings).save_pretrained(str(directory))
    return read_tokenizer(directory)  # type: ignore[return-value]


def with_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> tuple[PreTrainedTokenizerBase, list[int], list[int]]:
    """A tokenizer that has these tokens, and their ids: of those it lacked, and of those it had.

    Wherever an added token stands in a text it is found whole. It is no "special" token: decoded text shows it.
    """
    from transformers import AddedToken

    before = tokenizer.get_vocab()
    lacked = [token for token in dict.fromkeys(tokens) if token not in before]
    had = [before[token] for token in dict.fromkeys(tokens) if token in before]
    if not lacked:
        return tokenizer, [], had
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(token, normalized=False, special=False) for token in lacked])
    after = grown.get_vocab()
    return grown, [after[token] for token in lacked], had


def trained(workdir: Path) -> int | None:
    """Tokens of the tokenizer that a run trained for itself, if it did."""
    directory = workdir / "tokenizer"
    return len(read_tokenizer(directory)) if has_tokenizer(directory) else None
