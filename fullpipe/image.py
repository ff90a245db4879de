"""The picture codec: base64 text to pixels and back, with numpy and Pillow only."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from fullpipe.errors import InvalidRequest

READABLE = ("PNG", "JPEG", "WEBP")

# A progressive JPEG has about ten scans, and each one costs a pass over the whole picture however
# few bytes it takes: 50 kB of empty scans keep a core busy for 3 s at 1024x1024.
MAX_JPEG_SCANS = 100
_START_OF_SCAN = b"\xff\xda"

# png: run lengths only, instead of a search for repetitions: a noisy 1024x1024 picture takes 76 ms
# and a noisy 256x256 one 5 ms (level 6: 170 ms and 35 ms, not smaller); flat ones grow by a half.
# webp: lossy, for a third of the bytes of jpeg; method 2 takes half the time of the default 4.
# jpeg: the fastest by far; full colour resolution (4:4:4) keeps coloured edges sharp.
_SAVE_OPTIONS: dict[str, dict[str, int]] = {
    "png": {"compress_type": zlib.Z_RLE},
    "webp": {"quality": 90, "method": 2},
    "jpeg": {"quality": 95, "subsampling": 0},
}
_PREVIEW_QUALITY = 80

# Pillow warns of damaged EXIF in words that the sender chooses; a server keeps no record of those.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(text: str, *, name: str, max_bytes: int, max_side_px: int) -> np.ndarray:
    """Decode a base64 PNG, JPEG or WebP into colours.

    EXIF orientation is applied. Transparency is dropped and the colours beneath it stay, as in
    ComfyUI's LoadImage. Of an animation the first frame counts. 16-bit channels keep their high
    byte.

    Args:
        text: standard or url-safe base64, padded or not, white space allowed, optionally after
            a `data:image/...;base64,` prefix.
        name: the input's name, for messages.
        max_bytes: largest allowed file.
        max_side_px: largest allowed width and height, checked before pixels are decoded.
    Returns:
        [1, H, W, 3] uint8.
    Raises:
        InvalidRequest: one line that begins with `name`.
    """
    return _decode(text, "RGB", name, max_bytes, max_side_px)


def decode_mask(text: str, *, name: str, max_bytes: int, max_side_px: int) -> np.ndarray:
    """Decode a base64 PNG, JPEG or WebP into a mask; white = repaint, black = keep.

    The mask is the brightness of the colours (ITU-R 601). Transparency is always ignored:
    whoever has a mask in an alpha channel sends that channel as a greyscale picture.

    Args:
        text, name, max_bytes, max_side_px: as for `decode_image`.
    Returns:
        [1, H, W] uint8.
    Raises:
        InvalidRequest: one line that begins with `name`.
    """
    return _decode(text, "L", name, max_bytes, max_side_px)


def encode_images(pixels: np.ndarray, output_format: str) -> list[str]:
    """Compress pictures.

    Args:
        pixels: [N, H, W, 3] uint8.
        output_format: png (lossless), webp (lossy, quality 90), jpeg (quality 95, 4:4:4) or raw.
    Returns:
        One base64 string per picture; none for raw.
    """
    if output_format == "raw":
        return []
    options = _SAVE_OPTIONS[output_format]
    return [_encode(Image.fromarray(picture), output_format, **options) for picture in pixels]


def jpeg_preview(rgb: np.ndarray, max_side: int) -> str:
    """A small base64 JPEG of one picture, shrunk if a side exceeds `max_side`, never enlarged.

    Args:
        rgb: [h, w, 3] uint8.
        max_side: pixels.
    """
    image = Image.fromarray(rgb)
    image.thumbnail((max_side, max_side), Image.Resampling.BILINEAR)
    return _encode(image, "jpeg", quality=_PREVIEW_QUALITY)


def _decode(text: str, mode: str, name: str, max_bytes: int, max_side_px: int) -> np.ndarray:
    data = _from_base64(text, name, max_bytes)
    if data.startswith(b"\xff\xd8") and data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise InvalidRequest(
            f"{name} is a JPEG of {data.count(_START_OF_SCAN)} scans, allowed {MAX_JPEG_SCANS}"
        )
    # Pillow's parsers answer hostile bytes with almost any exception (OSError, SyntaxError,
    # ValueError, struct.error, TypeError, ...), and each of them means the same to the sender.
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except Image.DecompressionBombError:
        raise InvalidRequest(
            f"{name} has far too many pixels, allowed {max_side_px} pixels a side"
        ) from None
    except Exception:
        raise InvalidRequest(f"{name} is no PNG, JPEG or WebP picture") from None
    if max(image.size) > max_side_px:
        width, height = image.size
        raise InvalidRequest(f"{name} is {width}×{height} pixels, allowed {max_side_px} a side")
    try:
        return np.array(_to_mode(ImageOps.exif_transpose(image), mode))[None]
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InvalidRequest(f"{name} is a damaged {image.format}: {reason}") from None


def _from_base64(text: str, name: str, max_bytes: int) -> bytes:
    if text[:5].lower() == "data:":
        prefix, comma, text = text[:256].partition(",")[0], ",", text
        text = text.partition(comma)[2]
        if not prefix.lower().endswith(";base64"):
            raise InvalidRequest(f"{name} is a data: address without ;base64, before its data")
    packed = "".join(text.split()).rstrip("=")
    if not packed:
        raise InvalidRequest(f"{name} is empty, needs a base64 PNG, JPEG or WebP picture")
    if len(packed) * 3 // 4 > max_bytes:
        raise InvalidRequest(f"{name} has {len(packed) * 3 // 4} bytes, allowed {max_bytes}")
    packed = packed.replace("-", "+").replace("_", "/") + "=" * (-len(packed) % 4)
    try:
        return base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{name} is not base64: {str(error).lower()}") from None


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greyscale; Pillow would clip it to white instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    image.load()
    # What is transparent does not matter here, and Pillow warns of palettes that say so.
    image.info.pop("transparency", None)
    return image.convert("RGB").convert(mode)


def _encode(image: Image.Image, output_format: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, output_format, **options)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")
