"""The pictures a run leaves behind: the first batch, the losses, the results by kind of question, sample answers."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mmjax.batch import Batch
from mmjax.evaluation.answers import Score

INK, PALE, RULE = "#22252b", "#8a909c", "#dfe2e8"
BLUE, ORANGE, GREEN, RED, MARK = "#2f6fde", "#e08a2e", "#1f8a4c", "#c8402f", "#ffe08a"

COLUMNS, CHARACTER, LINE = 104, 0.602 * 11 / 72, 0.2  # of the text of a batch: characters, inches, inches


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer for the picture of samples: what was asked about which image, what came and what was expected."""

    question: str
    answer: str
    expected: str
    right: bool | None = None  # None = not a matter of right and wrong (a caption)
    image: Image.Image | None = None


def first_batch(
    path: Path, batch: Batch, decode: Callable[[list[int]], str], tokens_per_tile: int, rows: int = 4
) -> None:
    """Draw the first `rows` rows of a batch: thumbnails, and the text as the model reads it with what it is taught marked.

    `decode` turns token ids to text, special tokens included. A batch without tokens (classification, pairs of picture
    and text) is drawn as its tiles with their classes or texts; `decode` is then of the connector's tokens.
    """
    if batch.tokens is None:
        return _tiles(path, batch, decode)
    blocks = [_row(batch, decode, tokens_per_tile, row) for row in range(min(rows, len(np.asarray(batch.tokens))))]
    sheet = _Sheet(10.0, sum(len(lines) * LINE + (1.0 if images else 0.0) + 0.25 for lines, images in blocks) + 0.5)
    sheet.text(0.2, 0.25, "First batch", fontsize=12, fontweight="bold")
    sheet.text(9.8, 0.25, "what the model is taught to say", ha="right", bbox={"fc": MARK, "ec": "none", "pad": 2})
    y = 0.5
    for lines, images in blocks:
        for column, image in enumerate(images[:10]):
            sheet.image(0.2 + 0.96 * column, y, 0.9, image)
        y += 1.0 if images else 0.0
        for spans in lines:
            x = 0.2
            for text, marked in spans:
                width = CHARACTER * len(text)
                if marked:
                    sheet.box(x, y + 0.01, width, LINE - 0.02, MARK)
                colour = INK if marked else "#5b616c"
                sheet.text(x, y + LINE / 2, text, family="monospace", fontsize=11, color=colour)
                x += width
            y += LINE
        y += 0.25
    _save(sheet.figure, path)


def losses(path: Path, metrics: Iterable[Mapping[str, Any]]) -> None:
    """Draw the training and validation loss of each stage over its steps.

    `metrics` are the rows of metrics.jsonl: "stage", "step" and "loss" or "validation_loss".
    """
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metrics:
        for key in ("loss", "validation_loss"):
            if key in row:
                curves = stages.setdefault(row["stage"], {"loss": [], "validation_loss": []})
                curves[key].append((row["step"], row[key]))
    if not stages:
        return
    figure = Figure(figsize=(min(3.6 * len(stages) + 0.6, 14), 3.2), layout="constrained")
    for axes, (stage, curves) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items()):
        steps, values = zip(*curves["loss"]) if curves["loss"] else ((), ())
        axes.plot(steps, values, color=BLUE, linewidth=1.2, label="training")
        if curves["validation_loss"]:
            steps, values = zip(*curves["validation_loss"])
            axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="held out")
        axes.set_yscale("log")
        axes.set_title(stage, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_xlabel("step", color=PALE)
        _plain(axes)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def results(
    path: Path,
    scores: Mapping[str, Score],
    blind: Mapping[str, Score] | None = None,
    title: str = "Accuracy on held-out questions",
) -> None:
    """Draw the share of right answers by kind, with 95 % intervals, and of the blind twin beside it."""
    kinds = list(scores)
    figure = Figure(figsize=(7.5, 0.62 * len(kinds) + 1.3), layout="constrained")
    axes = figure.subplots()
    for offset, table, colour, label in (
        (-0.19, scores, BLUE, "with the image"),
        (0.19, blind or {}, RULE, "blind twin"),
    ):
        for row, kind in enumerate(kinds):
            if kind not in table:
                continue
            score = table[kind]
            low, high = score.interval
            axes.barh(row + offset, 100 * score.share, height=0.36, color=colour, label=label if row == 0 else None)
            axes.hlines(row + offset, 100 * low, 100 * high, color=INK, linewidth=1)
            axes.text(100 * high + 1.5, row + offset, f"{100 * score.share:.1f}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(kinds)), [f"{kind or 'all'}  ({scores[kind].total})" for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    axes.set_xlabel("% right, with 95 % interval", color=PALE)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    _plain(axes)
    axes.grid(axis="y", visible=False)
    if blind:
        figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside lower right")
    _save(figure, path)


def sample_answers(path: Path, answers: Sequence[Answer], columns: int = 4, title: str = "Sample answers") -> None:
    """Draw questions with their image, the model's answer, and what was expected where that differs."""
    if not answers:
        return
    side, gap, line = 2.2, 0.3, 0.18  # inches
    blocks = [(item, _said(item)) for item in answers]
    rows = [blocks[at : at + columns] for at in range(0, len(blocks), columns)]
    heights = [side + line * max(len(said) for _, said in row) + 0.4 for row in rows]
    sheet = _Sheet(columns * (side + gap) + gap, sum(heights) + 0.5)
    sheet.text(gap, 0.28, title, fontsize=12, fontweight="bold")
    top = 0.5
    for row, height in zip(rows, heights):
        for column, (item, said) in enumerate(row):
            x = gap + column * (side + gap)
            sheet.box(x, top, side, side, "#f2f3f6")
            if item.image is not None:
                sheet.image(x, top, side, item.image)
            else:
                sheet.text(x + side / 2, top + side / 2, "no image", ha="center", color=PALE)
            for number, (text, colour, weight) in enumerate(said):
                y = top + side + 0.16 + line * number
                sheet.text(x, y, text, color=colour, fontweight=weight, fontsize=9.5)
        top += height
    _save(sheet.figure, path)


def _said(item: Answer) -> list[tuple[str, str, str]]:
    """The lines below a picture: text, colour, weight."""
    colour = INK if item.right is None else GREEN if item.right else RED
    sign = "" if item.right is None else "\N{CHECK MARK} " if item.right else "\N{BALLOT X} "
    lines = [(text, INK, "normal") for text in _wrapped(item.question, 3)]
    lines += [(text, colour, "bold") for text in _wrapped(sign + item.answer, 4)]
    if not item.right:
        lines += [(text, PALE, "normal") for text in _wrapped("expected: " + item.expected, 4)]
    return lines


def _wrapped(text: str, lines: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 31, max_lines=lines, placeholder=" ...")


class _Sheet:
    """A figure on which things are placed in inches from the top left."""

    def __init__(self, width: float, height: float):
        self.figure, self.width, self.height = Figure(figsize=(width, height)), width, height

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
        style = {"color": INK, "va": "center", "fontsize": 9, **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **style)

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        corner = x / self.width, 1 - (y + height) / self.height
        self.figure.add_artist(
            Rectangle(corner, width / self.width, height / self.height, fc=colour, ec="none", zorder=0)
        )

    def image(self, x: float, y: float, side: float, image: Any) -> None:
        corner = x / self.width, 1 - (y + side) / self.height
        axes = self.figure.add_axes((*corner, side / self.width, side / self.height))
        axes.imshow(image, interpolation="nearest" if max(np.shape(image)[:2]) < 128 else "antialiased")
        axes.set_axis_off()


def _row(
    batch: Batch, decode: Callable[[list[int]], str], tokens_per_tile: int, row: int
) -> tuple[list[list[tuple[str, bool]]], list[np.ndarray]]:
    """One row as wrapped lines of (text, is supervised), and the pixels of its tiles."""
    tokens, segments, media, weights, virtual = (
        np.asarray(field)[row] if field is not None else np.full_like(np.asarray(batch.tokens)[row], -1)
        for field in (batch.tokens, batch.segments, batch.media, batch.weights, batch.virtual)
    )
    taught = np.zeros(len(tokens), bool)
    if batch.decoder_tokens is None:
        taught[1:] = weights[:-1] > 0  # position t - 1 predicts the token at t
    spans: list[tuple[str, bool]] = []
    for segment in range(1, segments.max() + 1):
        inside = np.flatnonzero(segments == segment)
        run: list[int] = []
        for i, position in enumerate(inside):
            if virtual[position] >= 0:
                spans += [("[prompt]", False)] * int(virtual[position] == 0)
                continue
            if media[position] >= 0:
                if i == 0 or media[inside[i - 1]] < 0 or media[position] % max(tokens_per_tile, 1) == 0:
                    spans.append(("[image]", False))
                continue
            run.append(int(tokens[position]))
            following = inside[i + 1] if i + 1 < len(inside) else None
            if following is None or media[following] >= 0 or taught[following] != taught[position]:
                spans.append(
                    (decode(run).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"), bool(taught[position]))
                )
                run = []
        if batch.decoder_tokens is not None:  # what an encoder-decoder writes stands apart from what it reads
            written = np.asarray(batch.targets)[row][(np.asarray(batch.decoder_segments)[row] == segment) & (weights > 0)]
            spans += [(" \N{RIGHTWARDS ARROW} ", False), (decode(written.tolist()), True)]
        spans.append(("  ", False))
    images: list[np.ndarray] = []
    tiles = np.unique(media[media >= 0] // max(tokens_per_tile, 1))
    if batch.row_media is not None:
        tiles = np.unique(np.asarray(batch.row_media)[row])
    if batch.images is not None and (tiles >= 0).any():
        pixels = np.asarray(batch.images)
        group = row // (len(np.asarray(batch.tokens)) // len(pixels))
        # Behind the tokens of all tiles there may be a newline's.
        images = [pixels[group, tile] for tile in tiles if 0 <= tile < pixels.shape[1]]
    return _lines(spans), images


def _lines(spans: Iterable[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """The spans broken into lines of at most COLUMNS characters, at spaces where there are some."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0
    for text, marked in spans:
        for word in re.findall(r" *[^ ]+| +", text):
            if used and used + len(word) > COLUMNS:
                lines.append([])
                word, used = word.lstrip(), 0
            for at in range(0, len(word), COLUMNS):
                if at:
                    lines.append([])
                lines[-1].append((word[at : at + COLUMNS], marked))
                used = len(word) - at if at else used + len(word)
    return [line for line in lines if line]


def _tiles(path: Path, batch: Batch, decode: Callable[[list[int]], str]) -> None:
    kept = np.full((*np.shape(batch.tiles), 1, 1, 3), 230, np.uint8)  # of pictures only cached features are there
    pixels = kept if batch.images is None else np.asarray(batch.images)
    pixels = pixels.reshape(-1, *pixels.shape[2:])[:32]
    if batch.classes is not None:
        labels = [str(label) for label in np.asarray(batch.classes).reshape(-1)[:32]]
    else:
        words, real = (np.asarray(a).reshape(-1, a.shape[-1])[:32] for a in (batch.connector_tokens, batch.connector_segments))
        labels = ["\n".join(textwrap.wrap(decode(ids[on > 0].tolist()), 16, max_lines=4)) for ids, on in zip(words, real)]
    figure = Figure(figsize=(8, 1.2 * -(-len(pixels) // 8) + 0.4), layout="constrained")
    figure.suptitle("First batch", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    for axes, image, label in zip(figure.subplots(-(-len(pixels) // 8), 8, squeeze=False).flat, pixels, labels):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(label, fontsize=9, color=INK, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    _save(figure, path)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(which="both", colors=PALE, labelcolor=INK, length=0, labelsize=9)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
