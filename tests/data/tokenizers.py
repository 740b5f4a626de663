"""Small tokenizers for the tests of the data room, made on the spot."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmjax.data import templates

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]


def byte_tokenizer(**settings) -> PreTrainedTokenizerFast:
    """Every byte is a token, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **settings
    )


def marked_tokenizer() -> PreTrainedTokenizerFast:
    """The same with the marks of all named templates."""
    tokenizer = byte_tokenizer()
    marks = dict.fromkeys(mark for name in templates.NAMES for mark in templates.markers(name))
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark not in SPECIAL]})
    return tokenizer
