"""The text that a Q-Former reads beside a picture, in its own vocabulary (InstructBLIP, arXiv 2305.06500; BLIP-2's first stage)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmjax.data import messages
from mmjax.data.messages import Message
from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextBeside:
    """length   tokens at most, those included that the tokenizer puts around every text ([CLS] and [SEP] of BERT's)."""

    tokenizer: PreTrainedTokenizerBase
    length: int

    def __post_init__(self) -> None:
        if self.length <= sum(map(len, self._around)):
            raise UserError(f"{self.length} tokens have no room for a word beside those that the connector's tokenizer puts around it")

    def instructions(self, conversation: Sequence[Message]) -> tuple[np.ndarray, ...]:
        """For each image what the user says in its turn, int32 ids; where that is too long, the end of it."""
        said = [messages.text(turn) for turn in conversation for _ in messages.images([turn])]
        return tuple(self._ids(text, end=True) for text in said)

    def caption(self, text: str) -> np.ndarray:
        """A picture's caption, int32 ids; where it is too long, the beginning of it."""
        return self._ids(text, end=False)

    def _ids(self, text: str, end: bool) -> np.ndarray:
        before, after = self._around
        room = self.length - len(before) - len(after)
        ids = self._bare(text.strip())
        ids = ids[max(0, len(ids) - room) :] if end else ids[:room]
        return np.array([*before, *ids, *after], np.int32)

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Ids before and behind every text."""
        whole, bare = self.tokenizer("a")["input_ids"], self._bare("a")
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
