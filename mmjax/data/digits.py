"""Real handwriting on small scenes, with questions that need the picture: data that every installation already has.

The 1,797 handwritten digits of 8x8 pixels that ship inside scikit-learn (UCI Optical Recognition of Handwritten Digits,
CC BY 4.0) are split by picture into train and held out. A scene shows one to four of them in the quarters of a
32x32 canvas; questions, answers and descriptions are made from it. Scene i of a data set depends on (seed, split, i) alone.

    DigitScenes(split="held_out", task="questions", size=600)[5]    -> a Sample with one question about scene 5

The answers are balanced so that guessing without the picture stays weak: counts and digits are uniform, "is there a 7?" is
yes half of the time whatever the digit.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data.images import BrokenImage
from mmjax.data.messages import Sample
from mmjax.errors import UserError

CANVAS = 32  # pixels of a side
QUARTERS = ("top left", "top right", "bottom left", "bottom right")  # reading order
KINDS = ("position", "count", "contains", "largest", "sum", "order")
SCRIBBLE = 10  # scribbles are digits less this
PLACES = 24  # of every picture of handwriting within a quarter
SPLITS = {"train": 1500, "held_out": 297}  # pictures of handwriting
TASKS = ("questions", "caption", "single", "facts")
CANVASES = ("square", "any")


class DigitScenes:
    """A data set of `size` samples (see mmjax.data.sources.Dataset).

    split   "train" or "held_out": whose handwriting is shown; train also draws it slightly turned and stretched
    task    "questions"  one question about a scene, the kinds in turn
            "caption"    the scene described: "top left 3, bottom right 7"
            "single"     one digit among up to three scribbles (digits with their halves swapped); its class is the answer,
                         an entry of `classes`
            "facts"      the text-only twin: in the picture's place a word for each quarter, "3 empty empty 7"; the kinds in
                         turn, and the request to describe the scene
    kinds   which questions are asked (all of KINDS)
    pictures   of a sample. With several, a question is about one of them ("In picture 2: how many digits are there?"), and a
               caption is a document: each picture before its own description
    canvas  "square", or "any": of three scenes one stands in a half of a canvas twice as wide and one of one twice as high
    """

    classes = tuple("0123456789")  # of the task "single"

    def __init__(
        self,
        split: str = "train",
        task: str = "questions",
        size: int = 6000,
        seed: int = 0,
        kinds: tuple[str, ...] = KINDS,
        pictures: int = 1,
        canvas: str = "square",
    ):
        for value, known, what in ((split, SPLITS, "split"), (task, TASKS, "task"), (canvas, CANVASES, "canvas")):
            if value not in known:
                raise UserError(f"digits: unknown {what} {value!r}; there are {', '.join(known)}")
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise UserError(f"digits: unknown kind of question {unknown[0]!r}; there are {', '.join(KINDS)}")
        if size < 1:
            raise UserError(f"digits: size must be at least 1, not {size}")
        if pictures < 1 or (pictures > 1 and task not in ("questions", "caption")):
            raise UserError(f"digits: {pictures} pictures are not for the task {task!r}; questions and caption have several")
        self.pictures, self.canvas = pictures, canvas
        self.split, self.task, self.size, self.seed, self.kinds = split, task, size, seed, tuple(kinds)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if self.pictures > 1:
            return self._of_several(index)
        rng, scene = self._scene(index)
        picture = self._picture(index)
        if self.task == "single":
            kind, question, answer = "single", "Which digit is this?", str(max(scene.values()))
        elif self.task == "caption":
            kind, (question, answer) = "caption", ask("caption", scene, rng)
        else:
            kinds = self.kinds + ("caption",) if self.task == "facts" else self.kinds
            kind = kinds[index % len(kinds)]
            question, answer = ask(kind, scene, rng)
        if self.task == "facts":
            words = " ".join(str(scene.get(quarter, "empty")) for quarter in range(4))
            content = [{"type": "text", "text": f"{words}\n{question}"}]
        else:
            content = [picture, {"type": "text", "text": question}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return Sample(f"{self.task}-{self.split}-{self.seed}-{index:06d}", messages, kind, (answer,))

    def _of_several(self, index: int) -> Sample:
        """A question about one of several pictures, or a document of pictures and their descriptions."""
        scenes = range(index * self.pictures, (index + 1) * self.pictures)
        id = f"{self.task}{self.pictures}-{self.split}-{self.seed}-{index:06d}"
        if self.task == "caption":
            content = []
            for scene in scenes:
                content += [self._picture(scene), {"type": "text", "text": describe(self._scene(scene)[1])}]
            return Sample(id, [{"role": "assistant", "content": content}], "document")
        rng = np.random.default_rng((self.seed, self.pictures, list(SPLITS).index(self.split), index))
        asked, kind = int(rng.integers(self.pictures)), self.kinds[index % len(self.kinds)]
        question, answer = ask(kind, self._scene(scenes[asked])[1], rng)
        text = f"In picture {asked + 1}: {question[0].lower()}{question[1:]}"
        messages = [
            {"role": "user", "content": [*map(self._picture, scenes), {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return Sample(id, messages, kind, (answer,))

    def _picture(self, scene: int) -> dict[str, Any]:
        return {"type": "image", "path": f"{self.split}-{scene:06d}.png"}

    def image(self, name: str) -> Image.Image:
        """The picture of a sample, by the name its image part carries. RGB, 32x32, or one side twice that."""
        split, _, index = name.removesuffix(".png").rpartition("-")
        if split != self.split or not index.isdigit() or int(index) >= self.size * self.pictures:
            raise BrokenImage(f"digits: no picture named {name!r} in the {self.split} split of {self.size * self.pictures} scenes")
        rng, scene = self._scene(int(index))
        rng.random(8)  # so that what a question draws and how the picture is drawn are apart
        square, (height, width) = draw(scene, self.split, rng), self.picture_size(name)
        if (height, width) == (CANVAS, CANVAS):
            return square
        whole, second = Image.new("RGB", (width, height)), int(index) // 3 % 2
        whole.paste(square, ((width - CANVAS) * second, (height - CANVAS) * second))
        return whole

    def picture_size(self, name: str) -> tuple[int, int]:
        """(height, width) of a picture, by its name."""
        shape = int(name.removesuffix(".png").rpartition("-")[2]) % 3 if self.canvas == "any" else 0
        return CANVAS * (1 + (shape == 2)), CANVAS * (1 + (shape == 1))

    def _scene(self, index: int) -> tuple[np.random.Generator, dict[int, int]]:
        """A fresh generator for scene `index` and the digit in each occupied quarter, in reading order; below 0 = a scribble."""
        rng = np.random.default_rng((self.seed, TASKS.index(self.task), list(SPLITS).index(self.split), index))
        count = int(rng.integers(1, 5))
        quarters, digits = rng.permutation(4)[:count].tolist(), rng.integers(10, size=count).tolist()
        if self.task == "single":
            digits[1:] = [digit - SCRIBBLE for digit in digits[1:]]
        return rng, dict(sorted(zip(quarters, digits)))


def describe(scene: dict[int, int]) -> str:
    """A scene in words: {0: 3, 3: 7} is "top left 3, bottom right 7"."""
    return ", ".join(f"{QUARTERS[quarter]} {digit}" for quarter, digit in scene.items())


def ask(kind: str, scene: dict[int, int], rng: np.random.Generator) -> tuple[str, str]:
    """A question of this kind about the scene, and its answer."""
    digits = list(scene.values())
    if kind == "position":
        quarter = list(scene)[int(rng.integers(len(scene)))]
        return f"Which digit is at the {QUARTERS[quarter]}?", str(scene[quarter])
    if kind == "contains":
        present = bool(rng.integers(2))
        choices = sorted(set(digits)) if present else sorted(set(range(10)) - set(digits))
        return f"Is there a {choices[int(rng.integers(len(choices)))]}?", "yes" if present else "no"
    return {
        "count": ("How many digits are there?", str(len(digits))),
        "largest": ("What is the largest digit?", str(max(digits))),
        "sum": ("What is the sum of the digits?", str(sum(digits))),
        "order": ("Read the digits in order.", " ".join(map(str, digits))),
        "caption": ("Describe the digits.", describe(scene)),
    }[kind]


def draw(scene: dict[int, int], split: str, rng: np.random.Generator) -> Image.Image:
    """The scene in this split's handwriting: every digit about 14 pixels high, anywhere within its quarter."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    half = CANVAS // 2
    for quarter, digit in scene.items():
        written = _written(split)[digit % SCRIBBLE]
        top, left = half * (quarter // 2), half * (quarter % 2)
        tile = written[int(rng.integers(len(written)))]
        if digit < 0:
            tile = np.roll(tile, (half // 2, half // 2), (0, 1))
        canvas[top : top + half, left : left + half] = tile
    return Image.fromarray(canvas).convert("RGB")


@functools.lru_cache(maxsize=None)
def _written(split: str) -> dict[int, np.ndarray]:
    """Each digit in this split's handwriting, every picture of it at several places: uint8 [pictures * PLACES, 16, 16]."""
    rng = np.random.default_rng(16)
    written = {}
    for digit, pictures in handwriting(split).items():
        tiles = [_placed(Image.fromarray(picture), split, rng) for picture in pictures for _ in range(PLACES)]
        written[digit] = np.stack([np.asarray(tile) for tile in tiles])
    return written


def _placed(picture: Image.Image, split: str, rng: np.random.Generator) -> Image.Image:
    """A picture of 8x8 pixels somewhere in a quarter; in the train split also turned, slanted and stretched a little."""
    width, height, shear, angle = 14.0, 14.0, 0.0, 0.0
    if split == "train":
        width, height = rng.uniform(12.5, 15.5, 2)
        shear, angle = rng.uniform(-0.15, 0.15, 2)
    half = CANVAS // 2
    x, y = rng.uniform(width / 2, half - width / 2), rng.uniform(height / 2, half - height / 2)  # the digit's centre
    # From a pixel of the quarter back to the picture: about the centre, turned, slanted, scaled.
    cos, sin = np.cos(angle), np.sin(angle)
    rows = np.array([[cos + shear * sin, sin - shear * cos], [-sin, cos]]) * [[8 / width], [8 / height]]
    offsets = 4 - rows @ (x, y)
    matrix = (*rows[0], offsets[0], *rows[1], offsets[1])
    return picture.transform((half, half), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=None)
def handwriting(split: str) -> dict[int, np.ndarray]:
    """This split's pictures of each digit, uint8 [pictures, 8, 8]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = np.round(data.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(1797).permutation(len(pictures))
    chosen = order[: SPLITS["train"]] if split == "train" else order[SPLITS["train"] :]
    return {digit: pictures[chosen[data.target[chosen] == digit]] for digit in range(10)}
