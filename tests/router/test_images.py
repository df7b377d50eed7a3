import base64
import io
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from tessera.proto.image_layout import AnyResLayout, CropLayout, ImageLayout
from tessera.router.errors import ValidationError
from tessera.router.images import MAX_SIDE, as_rgb, decode_image_source, prepare_image
from tessera.router.request import PreparedImage

NEXT = AnyResLayout(336, 14)
SMALL_PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
SMALL = AnyResLayout(56, 14, SMALL_PINPOINTS)
CROP = CropLayout(56, 14)
LIMIT = 50_000_000


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    depth = len(Image.new(mode, (1, 1)).getbands())
    data = random.Random(seed).randbytes(width * height * depth)
    return Image.frombytes(mode, (width, height), data)


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def prepare(data: bytes, layout: ImageLayout = SMALL, max_pixels: int = LIMIT) -> PreparedImage:
    return prepare_image(data, layout, max_pixels)


def tiles(prepared: PreparedImage) -> np.ndarray[Any, Any]:
    side = int((len(prepared.tiles) / 3 / prepared.num_tiles) ** 0.5 + 0.5)
    array = np.frombuffer(prepared.tiles, np.uint8)
    return array.reshape(prepared.num_tiles, side, side, 3)


def refusal(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(ValidationError) as caught:
        prepare(data, max_pixels=max_pixels)
    return str(caught.value)


@pytest.fixture(scope="module")
def oracle() -> Callable[[Image.Image, ImageLayout], np.ndarray[Any, Any]]:
    """transformers' pixels before they are normalised, [tiles, side, side, 3]."""
    next_pil = pytest.importorskip(
        "transformers.models.llava_next.image_processing_pil_llava_next"
    ).LlavaNextImageProcessorPil
    llava_pil = pytest.importorskip(
        "transformers.models.llava.image_processing_pil_llava"
    ).LlavaImageProcessorPil

    def pixels(picture: Image.Image, layout: ImageLayout) -> np.ndarray[Any, Any]:
        options: dict[str, Any] = {
            "size": {"shortest_edge": layout.tile},
            "crop_size": {"height": layout.tile, "width": layout.tile},
            "do_rescale": False,
            "do_normalize": False,
        }
        if isinstance(layout, AnyResLayout):
            pinpoints = [list(pair) for pair in layout.pinpoints]
            processor = next_pil(image_grid_pinpoints=pinpoints, **options)
            values = processor(picture, return_tensors="np")["pixel_values"][0]
        else:
            values = llava_pil(**options)(picture, return_tensors="np")["pixel_values"]
        result: np.ndarray[Any, Any] = np.moveaxis(np.asarray(values), 1, -1)
        return result

    return pixels


def sizes(count: int, most: int) -> list[tuple[int, int]]:
    draw = random.Random(7)
    return [(draw.randint(1, most), draw.randint(1, most)) for _ in range(count)]


@pytest.mark.parametrize(
    ("layout", "pictures"),
    [
        (SMALL, [*sizes(60, 300), (1, 1), (1, 1000), (1000, 1), (56, 56), (112, 56), (3000, 20)]),
        (NEXT, [*sizes(5, 1500), (336, 336), (1, 1000), (1024, 768), (1200, 1300)]),
        (CROP, [*sizes(60, 300), (1, 1), (1, 1000), (1000, 1), (56, 56), (57, 58), (700, 20)]),
    ],
)
def test_tiles_equal_transformers_on_many_sizes(
    oracle: Callable[..., np.ndarray[Any, Any]],
    layout: ImageLayout,
    pictures: list[tuple[int, int]],
) -> None:
    for seed, (width, height) in enumerate(pictures):
        picture = noise(width, height, seed=seed)
        prepared = prepare(encoded(picture), layout)
        assert np.array_equal(tiles(prepared), oracle(picture, layout)), (width, height)
        plan = layout.plan(height, width)
        assert (prepared.num_tiles, prepared.num_tokens) == (plan.num_tiles, plan.num_tokens)
        assert (prepared.height, prepared.width) == (height, width)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_tiles_equal_transformers_on_every_png_kind(
    oracle: Callable[..., np.ndarray[Any, Any]], mode: str
) -> None:
    picture = noise(90, 70, "RGBA").convert(mode)
    again = Image.open(io.BytesIO(encoded(picture)))
    assert again.mode == mode
    assert np.array_equal(tiles(prepare(encoded(picture))), oracle(again, SMALL))


@pytest.mark.parametrize("transparency", [0, bytes(range(256))])
def test_tiles_equal_transformers_on_transparent_palettes(
    oracle: Callable[..., np.ndarray[Any, Any]], transparency: int | bytes
) -> None:
    data = encoded(noise(90, 70).convert("P"), transparency=transparency)
    assert np.array_equal(tiles(prepare(data)), oracle(Image.open(io.BytesIO(data)), SMALL))


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"quality": 70}),
        ("GIF", "P", {}),
        ("GIF", "L", {}),
    ],
)
def test_tiles_equal_transformers_on_every_format(
    oracle: Callable[..., np.ndarray[Any, Any]], format: str, mode: str, options: dict[str, Any]
) -> None:
    data = encoded(noise(90, 70, mode), format, **options)
    assert np.array_equal(tiles(prepare(data)), oracle(Image.open(io.BytesIO(data)), SMALL))


def test_large_transparent_pictures_are_put_on_white_strip_by_strip() -> None:
    picture = noise(1500, 1000, "RGBA")  # more than one strip
    white = Image.new("RGBA", picture.size, "white")
    whole = Image.alpha_composite(white, picture).convert("RGB")
    assert ImageChops.difference(as_rgb(picture), whole).getbbox() is None


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    values = [0, 255, 256, 0x1234, 0x8000, 0xFFFF]
    picture = Image.frombytes("I;16", (6, 1), struct.pack("<6H", *values))
    grey = Image.frombytes("L", (6, 1), bytes(value >> 8 for value in values))

    assert prepare(encoded(picture)).tiles == prepare(encoded(grey)).tiles


def test_32_bit_integers_saturate() -> None:
    picture = Image.frombytes("I", (3, 1), struct.pack("<3i", -5, 0x4000, 1 << 20))
    assert as_rgb(picture).getpixel((0, 0)) == (0, 0, 0)
    assert as_rgb(picture).getpixel((1, 0)) == (64, 64, 64)
    assert as_rgb(picture).getpixel((2, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_without_a_plain_meaning_are_refused(mode: str) -> None:
    with pytest.raises(ValidationError, match=mode):
        as_rgb(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(60, 40)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation

    prepared = prepare(encoded(stored, exif=exif))

    assert (prepared.height, prepared.width) == (40, 60)
    assert prepared.tiles == prepare(encoded(upright)).tiles


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_refuse_a_picture() -> None:
    data = encoded(noise(20, 20), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff garbage")
    assert prepare(data).width == 20


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation_counts(format: str) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert prepare(data).tiles == prepare(encoded(frames[0])).tiles


def test_larger_than_1024_is_accepted() -> None:
    assert prepare(encoded(Image.new("RGB", (1920, 1080))), NEXT).num_tokens == 1948


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_truncation_is_refused_or_decoded(format: str) -> None:
    data = encoded(noise(64, 64).convert("P" if format == "GIF" else "RGB"), format)
    assert "cannot be decoded" in refusal(data[: len(data) * 2 // 3])
    for length in range(0, len(data), 211):
        message = refusal(data[:length])
        assert "0x" not in message and "Error" not in message and len(message) < 200


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_flipped_bytes_never_raise_anything_else(format: str) -> None:
    original = encoded(noise(40, 40).convert("P" if format == "GIF" else "RGB"), format)
    draw = random.Random(1)
    for _ in range(150):
        data = bytearray(original)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            prepare(bytes(data))
        except ValidationError as error:
            assert len(str(error)) < 200


@pytest.mark.parametrize("format", ["TIFF", "BMP", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    assert "not a PNG, JPEG, WebP or GIF" in refusal(encoded(noise(32, 32), format))


@pytest.mark.parametrize(
    "data", [b"", b"x", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_picture_is_refused_without_echo(data: bytes) -> None:
    message = refusal(data)
    assert not data or data.decode() not in message


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def gif_header(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00\x3b"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def webp_header(width: int, height: int) -> bytes:
    size = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = b"WEBPVP8L" + struct.pack("<I", 6) + b"\x2f" + size + b"\0"
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (png_header(13_000, 13_000), "169000000"),
        (png_header(2**31 - 1, 2**31 - 1), "more than"),
        (png_header(MAX_SIDE + 1, 1), "no side may be longer than 65535"),
        (gif_header(60_000, 60_000), "more than"),
        (gif_header(10_000, 9_000), "90000000"),
        (webp_header(13_000, 13_000), "pixels"),
        (png_header(0, 5), "not a PNG"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(data: bytes, named: str) -> None:
    tracemalloc.start()
    message = refusal(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert named in message
    assert peak < 1_000_000


def png_chunk(name: bytes) -> bytes:
    return bytes(4) + name + struct.pack(">I", zlib.crc32(name))


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (8, 8)))[:33] + png_chunk(b"abCd") * 200_000,
        encoded(Image.new("RGB", (8, 8)))[:33] + png_chunk(b"IDAT") * 200_000,
        b"\xff\xd8" + b"\xff\xfe\0\2" * 500_000,
        b"\xff\xd8" + b"\xff" * 1_000_000,
        b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe\1a\0" * 300_000,
    ],
    ids=["png", "png-data", "jpeg", "jpeg-fill", "gif"],
)
def test_endless_segments_are_refused(data: bytes) -> None:
    start = time.process_time()
    assert "too many segments" in refusal(data)
    assert time.process_time() - start < 5


def test_endless_passes_are_refused() -> None:
    data = encoded(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    one_pass = data[data.rindex(b"\xff\xda") : -2]
    assert "too many passes" in refusal(data[:-2] + one_pass * 1000 + data[-2:])
    assert prepare(data[:-2] + one_pass * 10 + data[-2:]).width == 3000


def test_threads_do_not_disturb_each_other() -> None:
    files = [encoded(noise(200 + i, 150, seed=i), "JPEG") for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(prepare, files * 4))
    assert together == [prepare(data) for data in files] * 4


def test_the_limit_itself_is_allowed() -> None:
    data = encoded(noise(50, 40))
    assert prepare(data, max_pixels=2000).width == 50
    assert "50 x 40 = 2000 pixels, over the limit of 1999" in refusal(data, max_pixels=1999)


@pytest.mark.parametrize("size", [(MAX_SIDE, 1), (1, MAX_SIDE), (20_000, 3)])
@pytest.mark.parametrize("layout", [SMALL, CROP, NEXT, CropLayout(336, 14)])
def test_ribbons_are_served(size: tuple[int, int], layout: ImageLayout) -> None:
    prepared = prepare(encoded(Image.new("RGB", size, "teal")), layout)
    middle = tiles(prepared)[0, layout.tile // 2, layout.tile // 2]
    assert tuple(middle) == (0, 128, 128)


@pytest.mark.parametrize("size", [(700, 20), (20, 700), (999, 101), (3000, 70), (70, 3000)])
def test_centre_of_a_ribbon_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    data = encoded(noise(*size))
    whole = tiles(prepare(data, CROP)).astype(int)
    monkeypatch.setattr("tessera.router.images._CROP_PIXELS", 0)
    part = tiles(prepare(data, CROP)).astype(int)
    assert np.abs(part - whole).mean() < 1  # noise: no neighbouring place comes near


def test_hash_covers_pixels_and_size() -> None:
    def hash_of(picture: Image.Image) -> bytes:
        return prepare(encoded(picture), CROP).content_hash

    red = Image.new("RGB", (10, 20), "red")
    assert len(hash_of(red)) == 16
    assert hash_of(red) == prepare(encoded(red, "WEBP", lossless=True), CROP).content_hash
    assert hash_of(red) != hash_of(Image.new("RGB", (10, 21), "red"))  # same tiles
    assert hash_of(red) != hash_of(Image.new("RGB", (20, 10), "red"))  # same tiles
    assert hash_of(red) != hash_of(Image.new("RGB", (10, 20), "blue"))


DATA = bytes(range(256))
STANDARD = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()


@pytest.mark.parametrize(
    "source",
    [
        STANDARD,
        URL_SAFE,
        STANDARD.rstrip("="),
        f"  {STANDARD}\n",
        "\n".join(STANDARD[i : i + 76] for i in range(0, len(STANDARD), 76)),
        f"data:image/png;base64,{STANDARD}",
        f"data:image/png;base64,{URL_SAFE}",
        f"DATA:Image/PNG;Base64,{STANDARD}",
        f"data:;base64,{STANDARD}",
        f"data:image/jpeg;charset=utf-8;base64,{STANDARD}",
        f"data:image/jpeg;name=a.b;base64 ,\r\n {STANDARD}\r\n",
        "data:image/png;base64," + STANDARD.replace("+", "%2B").replace("/", "%2f"),
        f" data:application/octet-stream;base64,{STANDARD}",
    ],
)
def test_sources_are_decoded(source: str) -> None:
    assert decode_image_source(source) == DATA


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("file:///etc/passwd", "not read from files"),
        ("ftp://example.org/a.png", "not read from files"),
        ("s3://bucket/a.png", "not read from files"),
        ("../secret.png", "not read from files"),
        ("/etc/passwd", "not read from files"),
        ("~/secret", "not read from files"),
        ("C:\\secret.png", "not read from files"),
        ("data:image/png,abc", "must read data:<type>;base64"),
        ("data:image/png;base64", "must read data:<type>;base64"),
        ("data:image/png;base64,", "is empty"),
        ("", "is empty"),
        ("data:image/png;base64,a", "base64 encoding is invalid"),
        ("data:image/png;base64,ab!d", "base64 encoding is invalid"),
        ("data:image/png;base64,ab=d", "base64 encoding is invalid"),
        ("grüße", "base64 encoding is invalid"),
    ],
)
def test_sources_are_refused_in_a_sentence(source: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        decode_image_source(source)
    assert len(source) < 9 or source not in str(caught.value)


def test_a_jpeg_in_base64_begins_like_a_path() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    source = base64.b64encode(buffer.getvalue()).decode()
    assert source.startswith("/") and decode_image_source(source) == buffer.getvalue()


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=60) | st.binary(max_size=40).map(lambda raw: base64.b64encode(raw).decode())
)
def test_any_text_decodes_or_is_refused(source: str) -> None:
    with suppress(ValidationError):
        assert isinstance(decode_image_source(source), bytes)
