import json

import numpy as np
import pytest
from PIL import Image

from mmjax.data.images import BrokenImage, ImageProcessor, decode
from mmjax.errors import UserError
from tests.data.pictures import claimed_png, encoded, gradient

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.mark.parametrize(
    ("case", "aspect", "statistics"),
    [
        ("clip_shortest_edge_center_crop", "crop", CLIP),
        ("llava_pad_square", "pad", CLIP),
        ("siglip_squash", "squash", {}),
        ("blip_squash", "squash", CLIP),
        ("git_center_crop", "crop", CLIP),
    ],
)
def test_pixels_equal_the_published_processors(case, aspect, statistics, goldens):
    folder = goldens / "image_processor" / case
    config = json.loads((folder / "config.json").read_text())["effective_processor_config"]
    size = config.get("crop_size", config["size"])
    processor = ImageProcessor((size["height"], size["width"]), aspect, **statistics, resample=config["resample"])
    given, expected = np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")
    compared = 0
    for name in given.files:
        pixels = processor.pixels(given[name])
        assert pixels.shape == processor.shape and pixels.dtype == np.uint8
        reference = expected[name.replace("image", "pixel_values")].reshape(3, *pixels.shape[:2])
        np.testing.assert_allclose(processor.normalise(pixels).transpose(2, 0, 1), reference, atol=1e-6)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("sides", [(40, 60), (61, 33), (7, 7), (20, 1000)])
@pytest.mark.parametrize(("size", "edge"), [((32, 32), 0), ((30, 20), 40), ((31, 31), 20), ((16, 33), 17)])
def test_cropping_equals_transformers_at_odd_sizes(sides, size, edge):
    from transformers import CLIPImageProcessorPil

    image = np.random.default_rng(0).integers(0, 256, (*sides, 3), np.uint8)
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": edge or min(size)},
        crop_size={"height": size[0], "width": size[1]},
        do_rescale=False,
        do_normalize=False,
    )(image)["pixel_values"][0]
    np.testing.assert_array_equal(ImageProcessor(size, "crop", edge=edge).pixels(image), reference.transpose(1, 2, 0))


def test_an_unknown_aspect_is_refused():
    with pytest.raises(UserError, match="'stretch'"):
        ImageProcessor(16, "stretch")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_read(format):
    image = decode(encoded(gradient(), format))
    assert image.mode == "RGB" and image.size == (24, 16)
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(), int)).mean() < 12


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format in ("PNG", "TIFF"):
        decoded = np.asarray(decode(encoded(Image.fromarray(values), format)))
        np.testing.assert_array_equal(decoded[..., 0], np.rint(values / 257))
    unit = Image.fromarray((values / 65535).astype(np.float32))
    assert np.asarray(decode(encoded(unit, "TIFF")))[..., 1].ravel()[[0, -1]].tolist() == [0, 255]


def test_cmyk_becomes_rgb():
    red = encoded(Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(np.asarray(decode(red), int) - [250, 10, 10]).max() < 10


def test_palettes_with_and_without_transparency():
    palette = gradient().quantize(64)
    plain = np.asarray(decode(encoded(palette)))
    see_through = np.asarray(decode(encoded(palette, transparency=3)))
    np.testing.assert_array_equal(plain, np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(see_through, plain)
    with_alpha = gradient().convert("RGBA")
    with_alpha.putalpha(17)
    np.testing.assert_array_equal(np.asarray(decode(encoded(with_alpha))), np.asarray(gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.asarray(decode(encoded(gradient(), "PNG", exif=exif)))
    turned = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_90}[orientation]  # fmt: skip
    wanted = gradient() if turned is None else gradient().transpose(turned)
    np.testing.assert_array_equal(image, np.asarray(wanted))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    animated = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode(animated))[4, 4].tolist() == [255, 0, 0]


def test_one_pixel_is_a_picture():
    image = encoded(Image.new("RGB", (1, 1), (9, 8, 7)))
    for aspect in ("pad", "crop", "squash"):
        assert (ImageProcessor(14, aspect).pixels(image) == [9, 8, 7]).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(gradient(200, 200), "JPEG")[:900], "damaged or cut short"),
        (encoded(gradient(200, 200))[:300], "damaged or cut short"),
        (claimed_png(20000, 1), "too large: 20000 x 1"),
        (claimed_png(8000, 20), "too narrow"),
        (claimed_png(14200, 14200), "too large"),
        (claimed_png(60000, 60000), "too large"),
        (claimed_png(300, 300), "damaged or cut short"),
        (b"", "not a readable picture"),
        (b"GIF89a", "not a readable picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable picture"),
        (np.zeros((0, 5, 3), np.uint8), "empty|not a readable"),
        (np.zeros((4, 5, 7), np.uint8), "not a readable"),
        (np.zeros((4, 5, 3), np.float32), "not a readable"),
        (encoded(gradient(), "PPM"), "not a readable picture"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_decoded_is_refused_and_nothing_leaks(data, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(data)
    assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_never_escapes():
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(encoded(gradient(40, 30), format), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode(damaged[: rng.integers(1, len(whole) + 1)].tobytes()).mode == "RGB"
            except BrokenImage:
                pass
