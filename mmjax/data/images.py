"""Pictures: from encoded bytes to the uint8 pixels an encoder is fed.

Decoding distrusts its input: few formats, sizes read from the header before anything is decoded, and one error,
BrokenImage, whose text never repeats what a decoder said. Resizing is Pillow's, which the published processors were
trained with (other resizers differ by up to a quarter of the value range).
"""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmjax.data.tiling import Tiling, cut
from mmjax.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 64 << 20  # of a file
MAX_PIXELS = 25_000_000
MAX_SIDE = 8192
MAX_ASPECT = 100  # longer side / shorter side


class BrokenImage(UserError):
    """A picture that cannot be had or is not to be decoded; the message is safe to show to anybody."""


def decode(source: bytes | str | Path | np.ndarray | Image.Image, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture as 8-bit RGB: upright by its EXIF orientation, 16-bit values scaled, the first frame of an animation.

    source   encoded bytes, a file's path, a uint8 array [height, width(, channels)] or an opened picture. Transparency is
             dropped, as the published processors do. Raises BrokenImage.
    """
    image = _opened(source, formats)
    try:
        image.load()
        return _upright(_eight_bit(image)).convert("RGB")
    except Exception as error:
        raise BrokenImage("the picture is damaged or cut short") from error


def size_of(
    source: bytes | str | Path | np.ndarray | Image.Image, formats: tuple[str, ...] = FORMATS
) -> tuple[int, int]:
    """(height, width) of what `decode` would give, without decoding where the header says it. Raises BrokenImage."""
    image = _opened(source, formats)
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as in _upright
        turned = False
    # Pillow says the size of a TIFF as it will be when turned.
    return image.size if turned and image.format != "TIFF" else image.size[::-1]


def _opened(source: bytes | str | Path | np.ndarray | Image.Image, formats: tuple[str, ...]) -> Image.Image:
    """A picture of which only the header is read, and that is not too large to be decoded. Raises BrokenImage."""
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, np.ndarray):
            image = Image.fromarray(source.squeeze(-1) if source.ndim == 3 and source.shape[-1] == 1 else source)
        else:
            image = Image.open(io.BytesIO(_bytes(source)), formats=formats)
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"the picture is too large (at most {MAX_PIXELS:,} pixels)") from error
    except Exception as error:
        raise BrokenImage(f"not a readable picture (formats: {', '.join(formats)})") from error
    width, height = image.size
    if not width or not height:
        raise BrokenImage("the picture is empty")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BrokenImage(
            f"the picture is too large: {width} x {height} (at most {MAX_PIXELS:,} pixels and sides of {MAX_SIDE})"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenImage(
            f"the picture is too narrow: {width} x {height} (sides differ by more than {MAX_ASPECT} times)"
        )
    return image


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How a picture becomes the encoder's pixels; equal to transformers' Pillow processors.

    size      side in pixels, or (height, width); with a tiling, of one tile
    aspect    how a picture, or the overview beside its tiles, is fitted in: "pad" (a square around it, filled with the
              mean colour, then as "crop": LLaVA-1.5), "crop" (shortest edge resized, then the centre cut out: CLIP),
              "squash" (both sides resized at will: SigLIP, and all published overviews)
    mean, std   of pixels scaled to [0, 1], one for each channel
    resample    Pillow's filter
    edge      length of the shortest edge before cropping; 0 = the shorter of `size`
    tiling    how a picture is cut into several tiles (see mmjax.data.tiling); None = it is one
    """

    size: int | tuple[int, int]
    aspect: str = "crop"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = Image.Resampling.BICUBIC
    edge: int = 0
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if self.aspect not in ("pad", "crop", "squash"):
            raise UserError(f"unknown image aspect {self.aspect!r}; there are pad, crop and squash")

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what `pixels` returns."""
        return self.height, self.width, 3

    @property
    def dtype(self) -> type[np.generic]:
        """Of what `pixels` returns."""
        return np.uint8

    def pixels(self, image: Any) -> np.ndarray:
        """uint8 [height, width, 3] of whatever `decode` takes, without a tiling. Raises BrokenImage."""
        if self.tiling is not None:
            raise UserError(f"a picture has several tiles under {self.tiling}, where one is expected")
        return self._fitted(decode(image))

    def count(self, height: int, width: int) -> int:
        """Tiles of a picture of this size."""
        return self.tiling.layout(height, width, self.shape[:2]).tiles if self.tiling else 1

    def tiles(self, image: Any, flipped: bool = False) -> np.ndarray:
        """uint8 [count, height, width, 3] of whatever `decode` takes, or of its mirror image. Raises BrokenImage."""
        picture = decode(image)
        if self.tiling is None:
            return self._fitted(picture)[None, :, :: -1 if flipped else 1]
        if flipped:
            picture = ImageOps.mirror(picture)
        layout = self.tiling.layout(picture.height, picture.width, self.shape[:2])
        resized = np.asarray(picture.resize((layout.width, layout.height), self._filter))
        tiles = cut(resized, layout, self.shape[:2])
        if not layout.overview:
            return tiles
        overview = self._fitted(picture)[None]
        return np.concatenate([overview, tiles] if layout.overview == "first" else [tiles, overview])

    @property
    def _filter(self) -> int:
        return getattr(self.tiling, "resample", self.resample)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """float32 of the same shape [..., 3]: scaled to [0, 1], less the mean, over the deviation."""
        scaled = (pixels.astype(np.float64) / 255).astype(np.float32)
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def _fitted(self, picture: Image.Image) -> np.ndarray:
        """uint8 [height, width, 3]: the whole picture by `aspect`."""
        if self.aspect == "squash":
            return np.asarray(picture.resize((self.width, self.height), self._filter))
        if self.aspect == "pad":
            picture = _square(picture, tuple(int(255 * value) for value in self.mean))
        edge = self.edge or min(self.height, self.width)
        short, long = sorted(picture.size)
        length = int(edge * long / short)
        landscape = picture.width > picture.height
        picture = picture.resize((length, edge) if landscape else (edge, length), self._filter)
        return _centre(np.asarray(picture), self.height, self.width)


def _bytes(source: bytes | str | Path) -> bytes:
    if not isinstance(source, (str, Path)):
        if len(source) > MAX_BYTES:
            raise BrokenImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
        return bytes(source)
    path = Path(source)
    if not path.is_file():
        raise BrokenImage(f"there is no such file: {path.name}")
    if path.stat().st_size > MAX_BYTES:
        raise BrokenImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
    return path.read_bytes()


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow clips deeper pixels to 255 where it converts them; here they are scaled."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        top = values.max(initial=0)
        if image.mode == "F":
            values *= 255 if top <= 1 else 1
        elif image.mode != "I" or top > 255:
            values /= 257
        exif = image.getexif()
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
        image.info["exif"] = exif.tobytes()
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is no reason to lose the picture
        return image


def _square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of this colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of [h, w, 3], black where it is smaller than what is cut out."""
    missing = [max(0, wanted - side) for wanted, side in zip((height, width), pixels.shape)]
    if any(missing):
        pixels = np.pad(pixels, [*((math.ceil(n / 2), n // 2) for n in missing), (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
