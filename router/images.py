"""From the bytes a client sent to the tiles a shard encodes.

Everything here is synchronous and free of shared state, so that it can run in a pool of threads.
The pixels equal those of transformers 5.23 (`LlavaNextImageProcessorPil`, `LlavaImageProcessorPil`)
before normalisation, bit by bit, for every size the two can both process.

Refusals are sentences of our own: an image library's messages may hold addresses, and a client's
bytes are never sent back.
"""

import binascii
import hashlib
import io
import re
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from tessera.proto.image_layout import CropLayout, ImageLayout, ImagePlan
from tessera.router.errors import ValidationError
from tessera.router.request import PreparedImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Decoders that client bytes may reach; Pillow has dozens more, with a history of their own."""

MAX_SIDE = 65_535
"""Longest side of a picture, pixels: JPEG's own limit.

A resize needs 32 bytes of filter coefficients per pixel of the longer side, so a PNG of one row
could ask for gigabytes while staying below any limit on its area.
"""

_PILLOW_PIXELS = 178_956_970
"""Pixels beyond which Pillow refuses by itself, whatever limit it is given here."""

_MAX_READS = 300_000
"""Reads of one file. Pillow walks a file's segments in Python; 20 MB of empty ones take 15 s.

A file of 20 MB made in good faith needs some 10,000 (PNG) or 160,000 (GIF).
"""

_MAX_PASS_PIXELS = 5_000_000_000
"""Pixels x passes of a JPEG. Ten passes are usual; each costs time for all pixels and 30 bytes."""

_CROP_PIXELS = 16_000_000
"""Pixels of a resized picture up to which it is computed whole before its centre is cut out."""

_STRIP_PIXELS = 1_000_000
"""Pixels put on white at once: bounds the copies that compositing makes."""

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
"""Pillow's pixel formats that convert to 8-bit RGB without loss of meaning."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of EXIF's orientation tag."""

_SCHEME = re.compile(r"\s*+([A-Za-z][A-Za-z0-9+.-]{1,31}):")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_JPEG_IN_BASE64 = "/9j/"
_WHITESPACE = b" \t\r\n\f\v"


def prepare_image(
    data: bytes, layout: ImageLayout, max_pixels: int, max_tokens: int | None = None
) -> PreparedImage:
    """Decode a picture, turn it upright, make it opaque RGB, resize it and cut it into tiles.

    Args:
        data: a PNG, JPEG, WebP or GIF file; of an animation the first frame counts.
        layout: how the model wants pictures cut.
        max_pixels: largest width x height, compared with the header before anything is decoded;
            above 178,956,970 Pillow's own limit counts.
        max_tokens: see `ImageLayout.plan`; it may have to be exceeded.

    Returns:
        Tiles as uint8 RGB [num_tiles, side, side, 3], the overview first, then row by row. The
        hash covers the picture's size and the grid too: equal tiles may mean different features.

    Raises:
        ValidationError: not one of these formats, damaged, too large, or not 8 or 16 bit integers.
    """
    picture = _upright(as_rgb(_load(_open(data, max_pixels))))
    plan = layout.plan(picture.height, picture.width, max_tokens)
    tiles = b"".join(tile.tobytes() for tile in _cut(picture, layout, plan))
    return PreparedImage(
        content_hash=_content_hash(picture, plan.grid, tiles),
        height=picture.height,
        width=picture.width,
        num_tiles=plan.num_tiles,
        tiles=tiles,
        num_tokens=plan.num_tokens,
        grid=plan.grid,
    )


def count_pixels(data: bytes, max_pixels: int) -> int:
    """Width x height, from the file's header: nothing is decoded.

    Raises:
        ValidationError: as `prepare_image` does for what a header tells.
    """
    width, height = _open(data, max_pixels).size
    return width * height


def scheme_of(source: str) -> str:
    """The scheme of an address in lower case; "" for base64 and paths."""
    match = _SCHEME.match(source)
    return match[1].lower() if match else ""


def decode_image_source(source: str) -> bytes:
    """The bytes inside what a client wrote where a picture is expected.

    Args:
        source: a data URI (any media type and parameters) or bare base64; standard or URL-safe
            alphabet, whitespace and missing padding are tolerated.

    Raises:
        ValidationError: another address, a file path, or no valid base64.
    """
    scheme = _SCHEME.match(source)
    if source.startswith("/") and not source.startswith(_JPEG_IN_BASE64):
        raise _elsewhere()  # no other format that is read begins so
    if scheme is None:
        return _decode_base64(source)
    if scheme[1].lower() == "data":
        return _decode_base64(_data_uri_payload(source, scheme.end()))
    raise _elsewhere()


def as_rgb(picture: Image.Image) -> Image.Image:
    """The picture as opaque 8-bit RGB; what is transparent becomes white.

    16-bit grey keeps its upper 8 bits, as the PNG decoder does for 16-bit colour; Pillow's own
    conversion would saturate nearly all of it.

    Raises:
        ValidationError: floating-point or Lab pixels, which no simple rule turns into RGB.
    """
    if picture.mode.startswith("I"):
        picture = _upper_8_bits(picture)
    if picture.mode not in _MODES:
        raise ValidationError(
            f"the picture has pixels of kind {picture.mode!r}; "
            "send 8 or 16 bit grey, palette, RGB or CMYK"
        )
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        return _on_white(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(_BoundedFile(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = min(max_pixels, _PILLOW_PIXELS)
        raise ValidationError(f"the picture has more than {limit} pixels") from None
    except ValidationError:
        raise
    except UnidentifiedImageError:
        raise ValidationError("the picture is not a PNG, JPEG, WebP or GIF file") from None
    except Exception:  # decoders meet hostile files: whatever they raise, the file is at fault
        raise _damaged() from None
    width, height = picture.size
    if width * height > max_pixels:
        raise ValidationError(
            f"the picture has {width} x {height} = {width * height} pixels, "
            f"over the limit of {max_pixels}"
        )
    if max(width, height) > MAX_SIDE:
        raise ValidationError(
            f"the picture is {width} x {height} pixels; no side may be longer than {MAX_SIDE}"
        )
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") * width * height > _MAX_PASS_PIXELS:
        raise ValidationError("the picture is a JPEG of too many passes; save it anew")
    return picture


class _BoundedFile(io.BytesIO):
    """A file in memory that can be read `_MAX_READS` times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > _MAX_READS:
            raise ValidationError("the picture's file has too many segments; save it anew")
        return super().read(size)


def _load(picture: Image.Image) -> Image.Image:
    try:
        picture.load()
    except ValidationError:
        raise
    except Exception:  # as in _open
        raise _damaged() from None
    return picture


def _damaged() -> ValidationError:
    return ValidationError("the picture cannot be decoded; the file is damaged or incomplete")


def _upper_8_bits(picture: Image.Image) -> Image.Image:
    grey = picture.convert("I").point([value >> 8 for value in range(65_536)], "L")
    grey.info.pop("transparency", None)  # names a 16-bit value that no longer exists
    return grey


def _on_white(picture: Image.Image) -> Image.Image:
    flat = Image.new("RGB", picture.size)
    rows = max(1, _STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        strip = picture.crop((0, top, picture.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    flat.info = picture.info
    return flat


def _upright(picture: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        method = None
    return picture if method is None else picture.transpose(method)


def _cut(picture: Image.Image, layout: ImageLayout, plan: ImagePlan) -> list[Image.Image]:
    if isinstance(layout, CropLayout):
        return [_centre(picture, plan)]
    side = layout.tile
    overview = picture.resize((side, side), Image.Resampling.BICUBIC)
    if plan.grid == (0, 0):
        return [overview]
    canvas = Image.new("RGB", (plan.canvas[1], plan.canvas[0]))
    fitted = picture.resize((plan.resized[1], plan.resized[0]), Image.Resampling.BICUBIC)
    canvas.paste(fitted, (plan.offset[1], plan.offset[0]))
    corners = [(row * side, column * side) for row, column in _cells(plan.grid)]
    tiles = [canvas.crop((left, top, left + side, top + side)) for top, left in corners]
    return [overview, *tiles]


def _cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


def _centre(picture: Image.Image, plan: ImagePlan) -> Image.Image:
    """The middle of the resized picture, `plan.canvas` large."""
    (height, width), (side, _) = plan.resized, plan.canvas
    top, left = -plan.offset[0], -plan.offset[1]
    if height * width <= _CROP_PIXELS:
        whole = picture.resize((width, height), Image.Resampling.BICUBIC)
        return whole.crop((left, top, left + side, top + side))
    return _centre_of_ribbon(picture, plan)


def _centre_of_ribbon(picture: Image.Image, plan: ImagePlan) -> Image.Image:
    """`_centre` of a picture too elongated to be resized whole (1 x 65,535 would be 7 gigapixels).

    Only the part of the source under the crop is resized. Its edges fall between pixels, and Pillow
    may choose another order of its two passes, so colours differ a little from resizing the whole:
    mostly by one level, more on noise.
    """
    (height, width), (side, _) = plan.resized, plan.canvas
    top, left = -plan.offset[0], -plan.offset[1]
    down, across = picture.height / height, picture.width / width  # source pixels per pixel
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    # Cutting the surroundings off first keeps the numbers small, as Pillow holds them in 32 bits.
    margin = 2 * int(max(down, across, 1.0) + 1)  # the bicubic filter reaches two pixels
    x, y = max(0, int(box[0]) - margin), max(0, int(box[1]) - margin)
    right = min(picture.width, int(box[2]) + 1 + margin)
    bottom = min(picture.height, int(box[3]) + 1 + margin)
    part = picture.crop((x, y, right, bottom))
    local = (box[0] - x, box[1] - y, min(box[2] - x, part.width), min(box[3] - y, part.height))
    return part.resize((side, side), Image.Resampling.BICUBIC, box=local)


def _content_hash(picture: Image.Image, grid: tuple[int, int], tiles: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for number in (picture.height, picture.width, *grid):
        digest.update(number.to_bytes(4, "little"))
    digest.update(tiles)
    return digest.digest()


def _data_uri_payload(uri: str, start: int) -> str:
    parameters, comma, payload = uri[start:].partition(",")
    if not comma or "base64" not in [name.strip() for name in parameters.lower().split(";")]:
        raise ValidationError("the data URI must read data:<type>;base64,<data>")
    return payload


def _decode_base64(text: str) -> bytes:
    try:
        raw = text.encode("ascii")
    except UnicodeEncodeError:
        raise _not_base64(text) from None
    if b"%" in raw:  # a URI may be percent-encoded
        raw = unquote_to_bytes(raw)
    digits = raw.translate(_URL_SAFE, delete=_WHITESPACE).rstrip(b"=")
    if not digits:
        raise ValidationError("the picture is empty")
    try:
        return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True)
    except binascii.Error:
        raise _not_base64(text) from None


def _not_base64(text: str) -> ValidationError:
    if len(text) < 4096 and any(mark in text for mark in ".~\\"):
        return _elsewhere()
    return ValidationError("the picture's base64 encoding is invalid")


def _elsewhere() -> ValidationError:
    return ValidationError(
        "pictures are not read from files or other addresses of this kind; send the picture itself "
        "as a data URI, or start the server with ALLOWED_IMAGE_PATHS and give an absolute path"
    )
