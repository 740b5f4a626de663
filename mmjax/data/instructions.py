"""Instructions in Alpaca's format, and N-best lists of speech recognition in HyPoradise's.

kind "alpaca"      [{"instruction": "...", "input": "" or "...", "output": "..."}, ...]                       (Taori et al., 2023)
kind "hypotheses"  [{"input": ["best", "second", ...], "output": "what was said"}, ...]                       HyPoradise, arXiv 2309.15701
                   [{"input1": "best", "input2": "the others", "output": "what was said"}, ...]               its LoRA scripts
kind "drawn_hypotheses"   the same, drawn: a sentence, and what is left of it when words are misheard; no file

Beside a list of hypotheses may stand its language-space noise embedding (RobustGER, arXiv 2401.10446), in a .npz file: `noise` [rows,
embeddings, width] and, for the audio noise distillation, `noisy` and `clean` [rows, width], the means over time of an audio encoder's
features. Row i belongs to sample i.
"""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np

from mmjax.data import rows
from mmjax.data.images import BrokenImage
from mmjax.data.messages import BadSample, Sample, validated
from mmjax.errors import UserError

INPUT = "\n\n### Input:\n"
OTHERS = "\n\n### Other-hypothesis:\n"


def from_alpaca(row: Mapping[str, Any], id: str) -> Sample:
    """A row of Alpaca's; an empty input is none. Raises BadSample."""
    asked, given, answer = (row.get(field) or "" for field in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (asked, given, answer)) or not asked or not answer:
        raise BadSample(id, "the row has no text in `instruction` or `output`")
    turns = [{"role": "user", "content": asked + (INPUT + given if given else "")}, {"role": "assistant", "content": answer}]
    return Sample(id, validated(turns, id), "instruction", (answer,))


class Hypotheses:
    """N-best lists and what was said (see mmjax.data.sources.Dataset).

    beside   the .npz file of embeddings; "" = there are none
    most     hypotheses of a list that are shown
    joint    what stands between the others
    """

    def __init__(self, path: str, beside: str = "", most: int = 5, joint: str = ". "):
        self._arguments = path, beside, most, joint
        self._rows, self._most, self._joint = rows.open_rows(path), most, joint
        self._beside = Beside(beside, len(self._rows)) if beside else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row, id = self._rows[index], self._rows.id(index)
        listed, said = row.get("input"), row.get("output")
        if isinstance(listed, list):
            heard = [str(text) for text in listed]
            best, others = heard[0] if heard else "", self._joint.join(heard[1 : self._most])
        else:
            best, others = str(row.get("input1") or ""), str(row.get("input2") or "")
        if not best or not isinstance(said, str):
            raise BadSample(id, "the row has no list of hypotheses in `input` (or `input1`), or no text in `output`")
        return _correction(id, best, others, said, str(index) if self._beside else "")

    def image(self, name: str) -> np.ndarray:
        """The noise embedding of a sample, float32 [embeddings, width]."""
        assert self._beside is not None
        return self._beside.noise(int(name))

    @property
    def audio_shape(self) -> tuple[int, ...]:
        """Of what `audio` returns; () where there is none."""
        return self._beside.audio_shape if self._beside else ()

    def audio(self, name: str) -> np.ndarray:
        """Means of noisy and of clean audio features, float32 [2, width]."""
        assert self._beside is not None
        return self._beside.audio(int(name))

    def picture_size(self, name: str) -> tuple[int, int]:
        rows, columns = self.image(name).shape
        return rows, columns

    def __reduce__(self) -> tuple:
        return Hypotheses, self._arguments


class DrawnHypotheses:
    """`size` sentences of a few words, and five hearings of each: the more noise a sample has, which its embedding shows, the more words
    are misheard (see mmjax.data.sources.Dataset).

    embeddings, width, audio   shapes of what stands beside each (see the file's beginning)
    """

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0, embeddings: int = 20, width: int = 384, audio: int = 1280):
        self._arguments = split, size, seed, embeddings, width, audio
        self._split, self._size, self._seed = split, size, seed
        self._shape, self._audio = (embeddings, width), audio

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        draw = self._draw(index)
        noise, said = draw.uniform(0, 0.5), [SAID[i] for i in draw.integers(0, len(SAID), 4)]
        heard = [" ".join(word if draw.uniform() > noise else MISHEARD[word] for word in said) for _ in range(5)]
        return _correction(f"{self._split}:{index}", heard[0], ". ".join(heard[1:]), " ".join(said), str(index))

    def image(self, name: str) -> np.ndarray:
        draw = self._draw(int(name))
        noise = draw.uniform(0, 0.5)
        return (noise * draw.normal(size=self._shape)).astype(np.float32)

    @property
    def audio_shape(self) -> tuple[int, ...]:
        return 2, self._audio

    def audio(self, name: str) -> np.ndarray:
        draw = self._draw(int(name))
        noise = draw.uniform(0, 0.5)
        clean = draw.normal(size=self._audio)
        return np.stack([clean + noise, clean]).astype(np.float32)

    def picture_size(self, name: str) -> tuple[int, int]:
        return self._shape

    def _draw(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._split != "train", index])

    def __reduce__(self) -> tuple:
        return DrawnHypotheses, self._arguments


SAID = ("two", "four", "ate", "one", "red", "blue", "there", "here", "write", "night", "see", "son")
MISHEARD = dict(zip(SAID, ("to", "for", "eight", "won", "read", "blew", "their", "hear", "right", "knight", "sea", "sun")))


class Beside:
    """What stands beside each of `count` samples in a .npz file."""

    def __init__(self, path: str, count: int):
        self._arguments = path, count
        try:
            with np.load(path, allow_pickle=False) as file:
                self._arrays = {name: file[name] for name in ("noise", "noisy", "clean") if name in file}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        found = {name: array.shape for name, array in self._arrays.items()}
        axes = {"noise": 3, "noisy": 2, "clean": 2}
        wrong = [name for name, shape in found.items() if len(shape) != axes[name] or shape[0] != count]
        if "noise" not in found or wrong or ("noisy" in found) != ("clean" in found):
            raise UserError(
                f"{path} is to hold noise [{count}, embeddings, width] and, both or neither, noisy and clean [{count}, width]; it holds "
                + ", ".join(f"{name} {list(shape)}" for name, shape in found.items())
            )

    def noise(self, row: int) -> np.ndarray:
        return np.asarray(self._arrays["noise"][row], np.float32)

    @property
    def audio_shape(self) -> tuple[int, ...]:
        return (2, self._arrays["noisy"].shape[-1]) if "noisy" in self._arrays else ()

    def audio(self, row: int) -> np.ndarray:
        return np.stack([self._arrays[name][row] for name in ("noisy", "clean")]).astype(np.float32)

    def __reduce__(self) -> tuple:
        return Beside, self._arguments


class Embeddings:
    """In an image processor's place, where what stands beside a text are embeddings of this shape, taken as they are."""

    tiling = None
    dtype: type[np.generic] = np.float32

    def __init__(self, shape: tuple[int, int]):
        self.shape: tuple[int, ...] = shape

    def tiles(self, embedding: Any, flipped: bool = False) -> np.ndarray:
        """[1, embeddings, width]. Raises BrokenImage for another shape."""
        found = np.asarray(embedding, np.float32)
        if found.shape != self.shape:
            raise BrokenImage(f"its embedding is {list(found.shape)}, the model's are {list(self.shape)}")
        return found[None]


def _correction(id: str, best: str, others: str, said: str, beside: str) -> Sample:
    content: list[dict[str, Any]] = [{"type": "image", "path": beside}] if beside else []
    content.append({"type": "text", "text": best + OTHERS + others})
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
    return Sample(id, validated(turns, id), "correction", (said,))
