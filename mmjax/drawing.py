"""The pictures a run leaves behind: the first batch, the losses, the results by kind of question, sample answers."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mmjax.batch import Batch
from mmjax.evaluation.answers import Score

INK, PALE, RULE = "#22252b", "#8a909c", "#dfe2e8"
BLUE, ORANGE, GREEN, RED, MARK = "#2f6fde", "#e08a2e", "#1f8a4c", "#c8402f", "#ffe08a"
SERIES = (BLUE, ORANGE, GREEN, "#8c5bc7", RED, "#2a9da8")

_COLUMNS = 100  # characters of a line in the picture of a batch


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

    `decode` turns token ids to text, special tokens included. A batch without tokens (classification) is drawn as its
    tiles with their classes.
    """
    if batch.tokens is None:
        return _tiles(path, batch)
    tokens = np.asarray(batch.tokens)
    blocks = [_row(batch, decode, tokens_per_tile, row) for row in range(min(rows, len(tokens)))]
    line, thumbnail, gap = 0.2, 0.9, 0.25  # inches
    heights = [len(lines) * line + (thumbnail + 0.1 if images else 0) + gap for lines, images in blocks]
    width, height = 10.0, sum(heights) + 0.5
    figure = Figure(figsize=(width, height))
    figure.text(0.02, 1 - 0.22 / height, "First batch", color=INK, fontsize=12, fontweight="bold", va="center")
    figure.text(
        0.98, 1 - 0.22 / height, "what the model is taught to say", color=INK, fontsize=9, ha="right", va="center",
        bbox={"facecolor": MARK, "edgecolor": "none", "pad": 2},
    )  # fmt: skip
    top = height - 0.5
    for lines, images in blocks:
        y = top
        for column, image in enumerate(images[:10]):
            axes = figure.add_axes(((0.2 + column * 0.96) / width, (y - thumbnail) / height, 0.9 / width, 0.9 / height))
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
        y -= thumbnail + 0.1 if images else 0
        for spans in lines:
            column = 0
            for text, marked in spans:
                figure.text(
                    (0.2 + column * 0.0955) / width, (y - line / 2) / height, text, family="monospace", fontsize=11.42 * 0.0955 / 0.0955,
                    va="center", color=INK if marked else "#555b66",
                    bbox={"facecolor": MARK, "edgecolor": "none", "pad": 0.6} if marked and text.strip() else None,
                )  # fmt: skip
                column += len(text)
            y -= line
        top -= heights[blocks.index((lines, images))]
    _save(figure, path)


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
    rows = -(-len(answers) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.75 * rows + 0.5), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, item in zip(grid, answers):
        picture = item.image if item.image is not None else Image.new("RGB", (32, 32), "#f2f3f6")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        axes.imshow(square, interpolation="nearest" if side < 128 else "antialiased")
        if item.image is None:
            axes.text(side / 2, side / 2, "no image", ha="center", va="center", color=PALE)
        colour = INK if item.right is None else GREEN if item.right else RED
        sign = "" if item.right is None else "\N{CHECK MARK} " if item.right else "\N{BALLOT X} "
        question, answer = _wrapped(item.question, 3), _wrapped(sign + item.answer, 4)
        axes.text(0, -0.05, question, transform=axes.transAxes, va="top", fontsize=10, color=INK)
        below = -0.05 - 0.082 * (question.count("\n") + 1)
        axes.text(0, below, answer, transform=axes.transAxes, va="top", fontsize=10, color=colour, fontweight="bold")
        if not item.right:
            below -= 0.082 * (answer.count("\n") + 1)
            expected = _wrapped("expected: " + item.expected, 4)
            axes.text(0, below, expected, transform=axes.transAxes, va="top", fontsize=10, color=PALE)
    for axes in figure.axes:
        axes.set_axis_off()
        axes.set_anchor("N")
    _save(figure, path)


def _wrapped(text: str, lines: int) -> str:
    return "\n".join(textwrap.wrap(" ".join(text.split()), 32, max_lines=lines, placeholder=" ...")).replace("$", r"\$")


def _row(
    batch: Batch, decode: Callable[[list[int]], str], tokens_per_tile: int, row: int
) -> tuple[list[list[tuple[str, bool]]], list[np.ndarray]]:
    """One row as wrapped lines of (text, is supervised), and the pixels of its tiles."""
    tokens, segments, media, weights = (
        np.asarray(field)[row] if field is not None else np.full_like(np.asarray(batch.tokens)[row], -1)
        for field in (batch.tokens, batch.segments, batch.media, batch.weights)
    )
    taught = np.concatenate([[False], weights[:-1] > 0])  # position t - 1 predicts the token at t
    spans: list[tuple[str, bool]] = []
    for segment in range(1, segments.max() + 1):
        inside = np.flatnonzero(segments == segment)
        run: list[int] = []
        for i, position in enumerate(inside):
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
        spans.append(("  ", False))
    images: list[np.ndarray] = []
    if batch.images is not None and (media >= 0).any():
        pixels = np.asarray(batch.images)
        group = row // (len(np.asarray(batch.tokens)) // len(pixels))
        images = [pixels[group, tile] for tile in np.unique(media[media >= 0] // tokens_per_tile)]
    return _lines(spans), images


def _lines(spans: Iterable[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """The spans broken into lines of _COLUMNS characters."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0
    for text, marked in spans:
        while text:
            piece, text = text[: _COLUMNS - used], text[_COLUMNS - used :]
            lines[-1].append((piece.replace("$", r"\$"), marked))
            used += len(piece)
            if used == _COLUMNS:
                lines.append([])
                used = 0
    return [line for line in lines if line]


def _tiles(path: Path, batch: Batch) -> None:
    pixels, classes = np.asarray(batch.images), np.asarray(batch.classes)
    pixels, classes = pixels.reshape(-1, *pixels.shape[2:])[:32], classes.reshape(-1)[:32]
    figure = Figure(figsize=(8, 1.2 * -(-len(pixels) // 8) + 0.4), layout="constrained")
    figure.suptitle("First batch", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    for axes, image, label in zip(figure.subplots(-(-len(pixels) // 8), 8, squeeze=False).flat, pixels, classes):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(str(label), fontsize=9, color=INK)
    for axes in figure.axes:
        axes.set_axis_off()
    _save(figure, path)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=PALE, labelcolor=INK, length=0, labelsize=9)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
