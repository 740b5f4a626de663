"""Documents of text and pictures, as they stand on web pages: one message by the assistant, whose parts come in reading order.

mmc4 (arXiv 2304.06939): sentences, and pictures that are matched with one of them; .jsonl, or OpenFlamingo's tars of one .json a document
    {"text_list": ["First sentence.", "Second one."],
     "image_info": [{"image_name": "a.jpg", "matched_text_index": 1, "matched_sim": 0.31}],     or "image_base64": "/9j/4AAQ..."
     "similarity_matrix": [[0.12, 0.31]]}                                                       [images][sentences]
obelics (arXiv 2306.16527): two lists, in which exactly one of the two is given at each place; .jsonl or .parquet
    {"images": [null, "a.jpg", null], "texts": ["First paragraph.", null, "Second one."]}

Which text is learned is a policy, written into the parts as `"supervised": false` where it is not: all text (VILA), the text after the first
image (OpenFlamingo, whose template also leaves out what stands behind an <|endofchunk|>), or only text that belongs to an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, Iterator, Literal, Mapping, Sequence, get_args

import numpy as np
from PIL import Image

from mmjax.data import images, rows, stores
from mmjax.data.messages import LEFT_OUT, PLACEHOLDER, BadSample, Message, Sample
from mmjax.errors import UserError

Labels = Literal["all", "after_image", "matched"]
Place = Literal["before", "after", "first"]
_ROW = "row:"  # begins the name of a picture that stands in its row: "row:12/3"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A sentence or paragraph, or an image by its name. matched: the text belongs to the image before it."""

    text: str = ""
    image: str | None = None
    matched: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a document is written.

    max_images    of a sample; 0 = all. Further images are left out and their text stays; with `window` a new sample begins
    min_images    documents with fewer are left out
    drop_single   share of the documents with one image that is left out, drawn by their ids (OpenFlamingo: 0.5)
    place         each image "before" its text or "after" it, or all images "first" (VILA's comparison, which loses in-context learning)
    labels        "all" text, that "after_image" (after the first one), or only that "matched" with an image
    next_image    share of the documents, drawn by their ids, in which a text belongs to the image behind it: each image moves before the
                  text that it follows (Flamingo's placement augmentation: 0.5; for pages whose text is not matched with images)
    joint         between two texts; nothing stands between text and image
    lead          texts before the first image that are kept; -1 = all
    window        characters after which a long document becomes another sample; 0 = one sample, cut where the row ends
    """

    max_images: int = 0
    min_images: int = 0
    drop_single: float = 0.0
    place: Place = "before"
    labels: Labels = "all"
    next_image: float = 0.0
    joint: str = " "
    lead: int = -1
    window: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("place", self.place, Place), ("labels", self.labels, Labels)):
            if value not in get_args(known):
                raise UserError(f"documents: unknown {name} {value!r}; there are {', '.join(get_args(known))}")

    def messages(self, pieces: Sequence[Piece], id: str) -> list[list[Message]]:
        """The document's samples as messages, one or, with a window, several. Raises BadSample for one that is left out."""
        shown = sum(piece.image is not None for piece in pieces)
        if shown < self.min_images:
            raise BadSample(id, f"{LEFT_OUT}it has {shown} images, fewer than min_images = {self.min_images}")
        if shown == 1 and _share(id, "drop_single") < self.drop_single:
            raise BadSample(id, f"{LEFT_OUT}it has one image (drop_single = {self.drop_single:g})")
        if _share(id, "next_image") < self.next_image:
            pieces = _before_their_texts(pieces)
        units = self._led(_units(pieces))
        parts = self._windows(units) if self.window else [self._limited(units)]
        contents = [content for part in parts if (content := self._content(part))]
        if not contents:
            raise BadSample(id, f"{LEFT_OUT}no text of it is supervised with labels = {self.labels!r}")
        return [[{"role": "assistant", "content": content}] for content in contents]

    def _led(self, units: list[list[Piece]]) -> list[list[Piece]]:
        first = next((number for number, unit in enumerate(units) if unit[0].image is not None), 0)
        return units[max(0, first - self.lead) :] if self.lead >= 0 else units

    def _limited(self, units: list[list[Piece]]) -> list[list[Piece]]:
        """The units without the images beyond max_images."""
        seen, kept = 0, []
        for unit in units:
            left = []
            for piece in unit:
                seen += piece.image is not None
                if piece.image is None or not self.max_images or seen <= self.max_images:
                    left.append(piece)
            kept += [left] if left else []
        return kept

    def _windows(self, units: list[list[Piece]]) -> Iterator[list[list[Piece]]]:
        """Neighbouring units that fit into a window, and have at most max_images images, together."""
        part: list[list[Piece]] = []
        size = shown = 0
        for unit in (piece for unit in units for piece in _cut(unit, self.window)):
            more, pictures = sum(len(piece.text) for piece in unit), sum(piece.image is not None for piece in unit)
            if part and (size + more > self.window or 0 < self.max_images < shown + pictures):
                yield self._limited(part)
                part, size, shown = [], 0, 0
            part, size, shown = [*part, unit], size + more, shown + pictures
        yield self._limited(part)

    def _content(self, units: Sequence[Sequence[Piece]]) -> list[dict[str, Any]]:
        """The parts of one message; nothing where no text of it is supervised."""
        if self.place == "after":
            units = [[*unit[-1:], *unit[:-1]] if unit[-1].image is None else unit for unit in units]
        pieces = [piece for unit in units for piece in unit]
        if self.place == "first":
            pieces.sort(key=lambda piece: piece.image is None)
        while pieces and pieces[-1].image is not None:  # nothing is learned from an image that no text follows
            pieces.pop()
        content: list[dict[str, Any]] = []
        seen = False
        for piece in pieces:
            if piece.image is not None:
                content.append({"type": "image", "path": piece.image})
                seen = True
                continue
            supervised = {"all": True, "after_image": seen, "matched": piece.matched}[self.labels]
            after_text = bool(content) and content[-1]["type"] == "text"
            text = self.joint * after_text + piece.text
            if after_text and content[-1].get("supervised", True) == supervised:
                content[-1]["text"] += text
            else:
                content.append({"type": "text", "text": text} | ({} if supervised else {"supervised": False}))
        learned = any(part["type"] == "text" and part.get("supervised", True) for part in content)
        return content if learned else []


@dataclasses.dataclass(frozen=True)
class Matching:
    """Which images of an mmc4 document are shown, and with which sentence.

    by               "stored": as the file has it; "assignment": one image to a sentence so that the summed similarity is largest
    min_similarity   of an image and its sentence (OpenFlamingo: 0.24)
    min_bytes        smaller pictures are left out, where they stand in the row (OpenFlamingo: 10 kB)
    """

    by: Literal["stored", "assignment"] = "stored"
    min_similarity: float = 0.0
    min_bytes: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("stored", "assignment"):
            raise UserError(f"mmc4: unknown matching {self.by!r}; there are stored and assignment")

    def pieces(self, row: Mapping[str, Any], id: str, index: int) -> list[Piece]:
        """The document in reading order; a picture in row `index` itself is named after the row. Raises BadSample."""
        texts, shown = row.get("text_list"), row.get("image_info", [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadSample(id, "`text_list` is not a list of sentences")
        if not isinstance(shown, list) or not all(isinstance(image, Mapping) for image in shown):
            raise BadSample(id, "`image_info` is not a list of images")
        large = [number for number, image in enumerate(shown) if self._large(image)]
        beside: dict[int, list[str]] = {}
        for number, sentence in self._matched(row, large, len(texts), id):
            image = shown[number]
            name = f"{_ROW}{index}/{number}" if image.get("image_base64") else image.get("image_name")
            if not isinstance(name, str):
                raise BadSample(id, f"image {number} has neither `image_name` nor `image_base64`")
            beside.setdefault(sentence, []).append(name)
        pieces = []
        for number, text in enumerate(texts):
            pieces += [Piece(image=name) for name in beside.get(number, [])]
            pieces += [Piece(clean(text), matched=number in beside)] if text.strip() else []
        return pieces

    def _large(self, image: Mapping[str, Any]) -> bool:
        embedded = image.get("image_base64")
        return not isinstance(embedded, str) or len(embedded) * 3 // 4 >= self.min_bytes

    def _matched(
        self, row: Mapping[str, Any], large: list[int], sentences: int, id: str
    ) -> Iterator[tuple[int, int]]:
        """Images and their sentences, by the number of the image."""
        if self.by == "assignment":
            from scipy.optimize import linear_sum_assignment

            if not large or not sentences:
                return
            scores = self._scores(row, sentences, id)[large]
            for number, sentence in zip(*linear_sum_assignment(scores, maximize=True)):
                if scores[number, sentence] >= self.min_similarity:
                    yield large[number], int(sentence)
            return
        for number in large:
            image = row["image_info"][number]
            sentence, similarity = image.get("matched_text_index"), image.get("matched_sim")
            if not isinstance(sentence, int) or not 0 <= sentence < sentences:
                raise BadSample(id, f"image {number} is matched with sentence {sentence!r} of {sentences}")
            if self.min_similarity and not isinstance(similarity, (int, float)):
                raise BadSample(id, f"image {number} has no `matched_sim`, which min_similarity asks for")
            if not self.min_similarity or similarity >= self.min_similarity:
                yield number, sentence

    def _scores(self, row: Mapping[str, Any], sentences: int, id: str) -> np.ndarray:
        """float [images, sentences]"""
        try:
            scores = np.array(row.get("similarity_matrix"), float)
        except (TypeError, ValueError):
            scores = np.zeros(0)
        if scores.shape != (len(row["image_info"]), sentences) or not np.isfinite(scores).all():
            raise BadSample(id, f"`similarity_matrix` is not one of {len(row['image_info'])} images and {sentences} sentences")
        return scores


def obelics_pieces(row: Mapping[str, Any], id: str) -> list[Piece]:
    """An obelics document in reading order. Raises BadSample."""
    shown, texts = row.get("images"), row.get("texts")
    if not isinstance(shown, list) or not isinstance(texts, list) or len(shown) != len(texts):
        raise BadSample(id, "`images` and `texts` are not lists of one length")
    pieces: list[Piece] = []
    for number, (image, text) in enumerate(zip(shown, texts)):
        if (image is None) == (text is None) or not isinstance(image if text is None else text, str):
            raise BadSample(id, f"place {number} does not have exactly one of an image and a text")
        if image is not None:
            pieces.append(Piece(image=image))
        elif text.strip():
            pieces.append(Piece(clean(text), matched=bool(pieces) and pieces[-1].image is not None))
    return pieces


class Documents:
    """A data set of documents (see mmjax.data.sources.Dataset); `matching` says that they are mmc4's, without it they are obelics'.

    With a window every document is read once when the data set is opened, to count its samples.
    """

    def __init__(self, path: str, images: str, layout: Layout, matching: Matching | None = None):
        self._arguments = path, images, layout, matching
        self._rows, self._store = rows.open_rows(path), stores.open_store(images)
        self._layout, self._matching = layout, matching
        self._samples = np.array(list(self._counted()), np.int64).reshape(-1, 2) if layout.window else None

    def __len__(self) -> int:
        return len(self._rows) if self._samples is None else len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        if self._samples is None:
            id, (messages,) = self._read(index)
            return Sample(id, messages, "document")
        row, part = self._samples[index].tolist()
        id, parts = self._read(row)
        return Sample(f"{id}#{part}", parts[part], "document")

    def image(self, name: str) -> Image.Image:
        return images.decode(self._picture(name))

    def picture_size(self, name: str) -> tuple[int, int]:
        return images.size_of(self._picture(name))

    def _picture(self, name: str) -> bytes:
        """The bytes of a picture in the store, or in its row. Raises BrokenImage."""
        if not name.startswith(_ROW):
            return self._store.read(name)
        row, number = map(int, name.removeprefix(_ROW).split("/"))
        return stores.decoded_base64(self._rows[row]["image_info"][number]["image_base64"], name)

    def _read(self, row: int) -> tuple[str, list[list[Message]]]:
        """A document's id and the messages of its samples. Raises BadSample."""
        found = self._rows[row]
        id = str(found["id"]) if found.get("id") is not None else self._rows.id(row)
        pieces = self._matching.pieces(found, id, row) if self._matching else obelics_pieces(found, id)
        return id, self._layout.messages(pieces, id)

    def _counted(self) -> Iterator[tuple[int, int]]:
        for row in range(len(self._rows)):
            try:
                count = len(self._read(row)[1])
            except BadSample:
                count = 1  # it is asked for, and says then what is wrong with it
            yield from ((row, part) for part in range(count))

    def __reduce__(self) -> tuple:
        return Documents, self._arguments


def clean(text: str) -> str:
    """Text of a document: a literal <image> in it must not be taken for a picture."""
    return text.replace(PLACEHOLDER, PLACEHOLDER.upper()).strip()


def _before_their_texts(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with the images between two texts moved before the first of the two, which belongs to them then."""
    moved: list[Piece] = []
    text: Piece | None = None
    behind: list[Piece] = []  # images behind `text`
    for piece in [*pieces, None]:
        if piece is not None and piece.image is not None:
            behind.append(piece)
            continue
        moved += [*behind, *([dataclasses.replace(text, matched=bool(behind))] if text else [])]
        text, behind = piece, []
    return moved


def _units(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Each text with the images right before it; images that no text follows are the last unit."""
    units: list[list[Piece]] = []
    open = False  # whether the last unit waits for its text
    for piece in pieces:
        if not open:
            units.append([])
        units[-1].append(piece)
        open = piece.image is not None
    return units


def _cut(unit: list[Piece], window: int) -> Iterator[list[Piece]]:
    """The unit, its text cut into pieces of at most `window` characters: at a line's end, else at a space, else anywhere."""
    before, text = [piece for piece in unit if piece.image is not None], "".join(piece.text for piece in unit)
    matched = unit[-1].matched
    while len(text) > window:
        at = next((at for mark in "\n " if (at := text.rfind(mark, 1, window + 1)) > 0), window)
        yield [*before, Piece(text[:at].rstrip(), matched=matched)]
        before, text = [], text[at:].lstrip()
    if before or text:
        yield [*before, *([Piece(text, matched=matched)] if text else [])]


def _share(id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the sample's id alone."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {id}".encode(), digest_size=8).digest()) / 2**64
