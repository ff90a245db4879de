"""The picture codec on real files, kind and hostile."""

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fullpipe.errors import InvalidRequest
from fullpipe.image import decode_image, decode_mask, encode_images, jpeg_preview

NAME = "init_image_b64"
LIMITS = {"name": NAME, "max_bytes": 1 << 20, "max_side_px": 512}


def picture(height=24, width=40):
    """Smooth colours with one sharp edge, [H, W, 3] uint8."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=-1)
    pixels[height // 2 :, : width // 4] = (250, 10, 60)
    return pixels.astype(np.uint8)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def decoded(image, file_format="PNG", **options):
    return decode_image(b64(saved(image, file_format, **options)), **LIMITS)


def refusal(text, decode=decode_image, **limits):
    with pytest.raises(InvalidRequest) as caught:
        decode(text, **{**LIMITS, **limits})
    message = str(caught.value)
    assert message.startswith(NAME)
    assert "\n" not in message and len(message) < 250
    return message


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height, *, bits=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def webp_canvas(width, height):
    """A WebP whose extended header promises a canvas and whose one frame is tiny."""
    frame = saved(Image.new("RGB", (16, 16)), "WEBP")[12:]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides
    chunks += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    place = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4)
    chunks += b"ANMF" + struct.pack("<I", len(place) + len(frame)) + place + frame
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


class TestEncoding:
    def test_png_gives_the_same_pixels_back(self):
        pixels = np.stack([picture(), picture()[::-1]])
        texts = encode_images(pixels, "png")
        assert len(texts) == 2
        for text, original in zip(texts, pixels, strict=True):
            np.testing.assert_array_equal(decode_image(text, **LIMITS)[0], original)

    @pytest.mark.parametrize("output_format", ["webp", "jpeg"])
    def test_lossy_formats_stay_close(self, output_format):
        [text] = encode_images(picture()[None], output_format)
        assert Image.open(io.BytesIO(base64.b64decode(text))).format == output_format.upper()
        difference = decode_image(text, **LIMITS)[0].astype(int) - picture()
        assert np.abs(difference).mean() < 4

    def test_jpeg_keeps_full_colour_resolution(self):
        stripes = np.zeros((16, 16, 3), np.uint8)
        stripes[:, ::2] = (255, 0, 0)
        stripes[:, 1::2] = (0, 0, 255)
        [text] = encode_images(stripes[None], "jpeg")
        assert np.abs(decode_image(text, **LIMITS)[0].astype(int) - stripes).max() < 40

    def test_raw_has_no_text(self):
        assert encode_images(picture()[None], "raw") == []

    def test_no_pictures(self):
        assert encode_images(np.zeros((0, 8, 8, 3), np.uint8), "png") == []

    def test_pixels_that_are_not_contiguous(self):
        pixels = np.ascontiguousarray(picture().transpose(2, 0, 1)).transpose(1, 2, 0)
        [text] = encode_images(pixels[None], "png")
        np.testing.assert_array_equal(decode_image(text, **LIMITS)[0], picture())

    def test_preview_shrinks_but_never_enlarges(self):
        large = Image.open(io.BytesIO(base64.b64decode(jpeg_preview(picture(96, 160), 40))))
        assert (large.format, large.size) == ("JPEG", (40, 24))
        small = Image.open(io.BytesIO(base64.b64decode(jpeg_preview(picture(), 256))))
        assert small.size == (40, 24)


class TestText:
    @pytest.fixture
    def text(self):
        return b64(saved(Image.fromarray(picture()), "PNG"))

    def check(self, text):
        np.testing.assert_array_equal(decode_image(text, **LIMITS)[0], picture())

    def test_spellings_of_the_same_picture(self, text):
        self.check(text)
        self.check(text.rstrip("="))
        self.check(text.replace("+", "-").replace("/", "_"))
        self.check("\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n")
        self.check("data:image/png;base64," + text)
        self.check("data:;base64,\n" + text)

    def test_what_is_not_base64(self, text):
        assert "base64" in refusal("<html>no picture</html>")
        assert "base64" in refusal("ünïcödé" * 40)
        assert "base64" in refusal(text[:40] + "!" + text[40:])
        assert "base64" in refusal("abcde")
        assert ";base64," in refusal("data:image/png," + text)
        assert ";base64," in refusal("data:" + "x" * 1000)
        assert "empty" in refusal("")
        assert "empty" in refusal(" \n==")
        assert "empty" in refusal("data:image/png;base64,")

    def test_base64_of_something_else(self):
        assert "PNG, JPEG or WebP" in refusal(b64(b"not a picture at all"))
        assert "PNG, JPEG or WebP" in refusal(b64(bytes(5000)))
        assert "PNG, JPEG or WebP" in refusal("AAAA")

    def test_too_many_bytes(self, text):
        message = refusal(text, max_bytes=100)
        assert f"{len(base64.b64decode(text))} bytes, allowed 100" in message


class TestModes:
    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    def test_formats(self, file_format):
        got = decoded(Image.fromarray(picture()), file_format)
        assert got.shape == (1, 24, 40, 3) and got.dtype == np.uint8
        assert np.abs(got[0].astype(int) - picture()).mean() < 8

    @pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM"])
    def test_other_formats_are_refused(self, file_format):
        data = saved(Image.fromarray(picture()), file_format)
        assert "PNG, JPEG or WebP" in refusal(b64(data))

    def test_greyscale_and_black_and_white(self):
        grey = Image.fromarray(picture()[..., 0])
        np.testing.assert_array_equal(decoded(grey)[0, ..., 2], picture()[..., 0])
        bits = decoded(grey.convert("1"))
        assert set(np.unique(bits)) == {0, 255}

    def test_sixteen_bits_are_scaled_not_clipped(self):
        wide = picture()[..., 0].astype(np.uint16) * 257
        got = decoded(Image.fromarray(wide))
        np.testing.assert_array_equal(got[0, ..., 1], picture()[..., 0])

    def test_sixteen_bit_colour(self):
        rows = b"".join(
            b"\0" + row.astype(">u2").tobytes() for row in picture().astype(np.uint16) * 257
        )
        data = (
            png_header(40, 24, bits=16)
            + png_chunk(b"IDAT", zlib.compress(rows))
            + png_chunk(b"IEND", b"")
        )
        np.testing.assert_array_equal(decode_image(b64(data), **LIMITS)[0], picture())

    def test_palette_with_transparency_is_silent(self):
        image = Image.fromarray(picture()).quantize(16)
        expected = np.asarray(image.convert("RGB"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = decoded(image, transparency=bytes(range(0, 160, 10)))
        np.testing.assert_array_equal(got[0], expected)

    def test_colours_beneath_transparency_stay(self):
        image = Image.fromarray(picture())
        image.putalpha(0)
        np.testing.assert_array_equal(decoded(image)[0], picture())

    def test_cmyk(self):
        cmyk = Image.fromarray(picture()).convert("CMYK")
        got = decoded(cmyk, "JPEG", quality=100)
        assert np.abs(got[0].astype(int) - picture()).mean() < 8

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    def test_exif_orientation(self, file_format):
        exif = Image.Exif()
        exif[0x0112] = 6
        got = decoded(Image.fromarray(picture()), file_format, exif=exif)
        assert got.shape == (1, 40, 24, 3)
        turned = np.rot90(picture(), -1)
        assert np.abs(got[0].astype(int) - turned).mean() < 8

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
    def test_first_frame_of_an_animation(self, file_format):
        first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
        got = decoded(first, file_format, save_all=True, append_images=[second], lossless=True)
        assert got.shape == (1, 32, 32, 3)
        assert tuple(got[0, 16, 16]) == pytest.approx((255, 0, 0), abs=3)


class TestMask:
    def test_white_repaints(self):
        mask = np.zeros((24, 40), np.uint8)
        mask[4:9] = 255
        got = decode_mask(b64(saved(Image.fromarray(mask), "PNG")), **LIMITS)
        assert got.shape == (1, 24, 40) and got.dtype == np.uint8
        np.testing.assert_array_equal(got[0], mask)

    def test_brightness_of_colours_and_no_alpha(self):
        image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
        assert (decode_mask(b64(saved(image, "PNG")), **LIMITS) == 255).all()
        image = Image.new("RGBA", (8, 8), (0, 255, 0, 255))
        assert (decode_mask(b64(saved(image, "PNG")), **LIMITS) == 150).all()

    def test_sixteen_bits(self):
        wide = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
        assert (decode_mask(b64(saved(wide, "PNG")), **LIMITS) == 0x80).all()

    def test_broken_ones_are_refused_by_name(self):
        refusal("rubbish!", decode_mask)


class TestHostile:
    def test_size_is_checked_before_pixels_are_decoded(self):
        bomb = png_header(30_000, 30_000) + png_chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        assert "512" in refusal(b64(bomb))
        # Small enough for Pillow's own check; the pixels are not there at all.
        message = refusal(b64(png_header(600, 300) + png_chunk(b"IDAT", b"")))
        assert "600×300" in message and "512" in message

    def test_webp_canvas(self):
        assert "512" in refusal(b64(webp_canvas(1 << 14, 1 << 14)))
        assert "4000×3000" in refusal(b64(webp_canvas(4000, 3000)))

    def test_jpeg_with_a_huge_frame(self):
        data = bytearray(saved(Image.fromarray(picture()), "JPEG"))
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", 65_500, 65_500)
        assert "512" in refusal(b64(bytes(data)))

    def test_jpeg_of_a_thousand_scans(self):
        data = saved(Image.new("L", (512, 512), 128), "JPEG", progressive=True)
        scan = data[data.rindex(b"\xff\xda") : -2]
        assert "scans" in refusal(b64(data[:-2] + scan * 1000 + b"\xff\xd9"))
        assert decode_image(b64(data), **LIMITS).shape == (1, 512, 512, 3)

    def test_compressed_text_bomb(self):
        bomb = zlib.compress(bytes(80 << 20), 9)
        data = png_header(8, 8) + png_chunk(b"zTXt", b"Comment\0\0" + bomb)
        refusal(b64(data + png_chunk(b"IDAT", b"")))

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    def test_truncated(self, file_format):
        rng = np.random.default_rng(7)
        noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = saved(Image.fromarray(noise), file_format)
        for kept in (4, 20, 40, len(data) // 2, len(data) - 40):
            refusal(b64(data[:kept]))

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
    def test_random_damage_is_a_picture_or_a_refusal(self, file_format):
        rng = np.random.default_rng(3)
        exif = Image.Exif()
        exif[0x0112] = 3
        exif[0x010E] = "a comment"
        whole = saved(Image.fromarray(picture()), file_format, exif=exif)
        refused = 0
        for _ in range(300):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(0, 256)
            try:
                got = decode_image(b64(bytes(data)), **LIMITS)
            except InvalidRequest as error:
                assert str(error).startswith(NAME) and "\n" not in str(error)
                refused += 1
            else:
                assert got.ndim == 4 and got.shape[3] == 3
        assert refused > 20

    def test_no_sides(self):
        refusal(b64(png_header(0, 8) + png_chunk(b"IDAT", zlib.compress(b""))))
