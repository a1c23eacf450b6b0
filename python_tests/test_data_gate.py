"""What is let in as an image, and what becomes of damaged files and damaged metadata."""

from __future__ import annotations

import os
import socket
import struct
import threading
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL")

from data_images import encode, scene  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402

from densecl_ext.data.images import (  # noqa: E402
    NarrowRangeWarning,
    Reading,
    decode,
    decode_rgb,
    encoded,
    printable,
    read_rgb,
    reason_of,
)
from densecl_ext.data.metadata import orientation_of, strip_jpeg, with_orientation  # noqa: E402

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return exif.tobytes()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data))


# ---------------------------------------------------------------- what is let in


def test_only_regular_files_are_read_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
        for name, kind in {
            "pipe.jpg": "a named pipe",
            "link.jpg": "a named pipe",
            "folder.jpg": "a folder",
            "zero.jpg": "a device",
            "socket.jpg": "a socket",
        }.items():
            told: list[str] = []

            def attempt(name: str = name, told: list[str] = told) -> None:
                try:
                    read_rgb(tmp_path / name)
                except ValueError as error:
                    told.append(str(error))

            thread = threading.Thread(target=attempt, daemon=True)
            thread.start()
            thread.join(10.0)
            assert told == [f"expected a regular file, got {kind}"]


def test_a_huge_file_costs_no_memory(tmp_path):
    for head in (b"", encode(scene(0), "JPEG")):
        with open(tmp_path / "sparse.jpg", "wb") as file:
            file.write(head)
            file.truncate(40 << 30)
        with pytest.raises(ValueError, match="max_pixels|none of the formats"):
            read_rgb(tmp_path / "sparse.jpg")


@pytest.mark.parametrize(
    "kind", ["EPS", "PDF", "ICO", "ICNS", "TGA", "PPM", "PCX", "JPEG2000", "SGI", "XBM", "DDS"]
)
def test_other_formats_are_refused_by_their_first_bytes(tmp_path, kind, monkeypatch):
    import subprocess

    image = scene(1, 64, 64).convert("1" if kind == "XBM" else "RGB")
    (tmp_path / "image.jpg").write_bytes(encode(image, kind))
    monkeypatch.setattr(subprocess, "Popen", None)  # no program is started
    with pytest.raises(ValueError, match="none of the formats"):
        read_rgb(tmp_path / "image.jpg")


def test_too_many_pixels_name_the_option(tmp_path):
    data = encode(Image.new("L", (300, 200)), "PNG")
    with pytest.raises(ValueError, match=r"300 x 200 pixels, more than max_pixels = 59,999; raise"):
        decode_rgb(data, Reading(max_pixels=59_999))
    assert decode_rgb(data, Reading(max_pixels=60_000)).size == (300, 200)


def test_more_pixels_than_pillow_allows_can_be_had(monkeypatch, recwarn):
    """Without changing Pillow's own limit for the rest of the program."""
    from densecl_ext.data import torchvision_loader

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(torchvision_loader, "_CROP_PIXELS", 10_000)
    image = decode_rgb(encode(scene(0, 400, 300), "PNG"))
    box = (3, 7, 397, 300)
    part = torchvision_loader.cropped(image, box)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == 10_000
    np.testing.assert_array_equal(np.asarray(part), np.asarray(image)[7:300, 3:397])


@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_checked(value):
    with pytest.raises(ValueError, match=f"max_pixels must be at least 1, got {value}"):
        Reading(max_pixels=value)


# ---------------------------------------------------------------- metadata


def chunk(kind: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    return data[:33] + b"".join(chunks) + data[33:]  # behind IHDR


def raw_profile(exif: bytes) -> bytes:
    return b"\nexif\n%8d\n" % len(exif) + exif.hex().encode() + b"\n"


TEXT = b"Raw profile type exif\0\0"
DAMAGED_CHUNKS = {
    "exif of noise": [chunk(b"eXIf", bytes(range(200)))],
    "exif without end": [chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\xff")],
    "exif with a far offset": [chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f")],
    "exif with a wrong checksum": [chunk(b"eXIf", exif_of(1)[6:], crc=1)],
    "text that does not inflate": [chunk(b"zTXt", b"comment\0\0" + bytes(50))],
    "text that inflates to much": [chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(200 << 20)))],
    "text without keyword": [chunk(b"tEXt", b"x" * 40), chunk(b"iTXt", b"\xff\0\1\0")],
    "profile of odd digits": [chunk(b"tEXt", TEXT[:-1] + b"\nexif\n  3\nabz")],
    "profile that does not inflate": [chunk(b"zTXt", TEXT + b"no zlib")],
    "profile of colours": [chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))],
    "colours": [chunk(b"sRGB", b""), chunk(b"gAMA", b"1"), chunk(b"cHRM", b"12")],
    "animation": [chunk(b"acTL", b"1"), chunk(b"fcTL", b"2")],
    "physical size": [chunk(b"pHYs", b"1")],
    "a length beyond the file": [b"\x7f\xff\xff\xfftEXt" + b"abc\0def" + bytes(4)],
    "a length that is too short": [b"\0\0\0\x03tEXt" + b"abc\0defghijklmnop" + bytes(4)],
    "an unknown kind": [chunk(b"aBCd", bytes(9))],
}


@pytest.mark.parametrize("name", DAMAGED_CHUNKS)
def test_damaged_png_metadata_costs_nothing(name):
    data = encode(scene(3), "PNG")
    damaged = with_chunks(data, *DAMAGED_CHUNKS[name])
    np.testing.assert_array_equal(pixels(damaged), pixels(data))


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"eXIf", exif_of(6)[6:])],
        [chunk(b"eXIf", exif_of(6)[6:], crc=0)],
        [chunk(b"eXIf", exif_of(6)[6:-9])],
        [chunk(b"tEXt", TEXT[:-1] + raw_profile(exif_of(6)))],
        [chunk(b"zTXt", TEXT + zlib.compress(raw_profile(exif_of(6))))],
        [chunk(b"zTXt", TEXT + zlib.compress(raw_profile(exif_of(6)) + os.urandom(999))[:-400])],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)],
        [chunk(b"eXIf", bytes(60)), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)],
    ],
)
def test_png_is_turned_upright_by_what_is_left_of_its_metadata(chunks):
    data = encode(scene(3), "PNG")
    np.testing.assert_array_equal(pixels(with_chunks(data, *chunks)), np.rot90(pixels(data), -1))


def segment(marker: int, body: bytes, length: int | None = None) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", (length or len(body) + 2)) + body


DAMAGED_SEGMENTS = {
    "exif of noise": segment(0xE1, b"Exif\0\0" + bytes(range(256))),
    "exif that ends early": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x09"),
    "exif that is empty": segment(0xE1, b""),
    "a preview inside": segment(0xE1, b"Exif\0\0" + encode(scene(9, 16, 16), "JPEG")),
    "a length that is too short": segment(0xE1, b"Exif\0\0" + bytes(80), length=30),
    "a length that is too long": segment(0xE1, b"Exif\0\0" + bytes(80), length=300),
    "a length beyond the file": segment(0xE2, b"ICC_PROFILE\0" + bytes(80), length=65535),
    "a length of nothing": segment(0xFE, b"", length=1) + b"some text",
    "previews and a length": segment(
        0xE1, b"Exif\0\0" + encode(scene(9, 16, 16), "JPEG"), length=700
    ),
    "several pictures": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x03" + bytes(30)),
    "a profile": segment(0xE2, b"ICC_PROFILE\0\x05\x02" + bytes(30)),
    "photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\xff\xff"),
    "xmp": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta" + b"\xff" * 40),
    "a short colour transform": segment(0xEE, b"Adobe\0"),
    "padding": b"\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", DAMAGED_SEGMENTS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_damaged_jpeg_metadata_costs_nothing(name, options):
    data = encode(scene(3), "JPEG", **options)
    damaged = data[:2] + DAMAGED_SEGMENTS[name] + data[2:]
    np.testing.assert_array_equal(pixels(damaged), pixels(data))
    assert encoded(damaged).whole


@pytest.mark.parametrize(
    "body",
    [
        exif_of(6),
        exif_of(6)[:-9],
        b"http://ns.adobe.com/xap/1.0/\0" + XMP + b"\xff\0",
    ],
)
def test_jpeg_and_webp_are_turned_upright_by_what_is_left_of_their_metadata(body):
    data = encode(scene(3), "JPEG")
    upright = np.rot90(pixels(data), -1)
    np.testing.assert_array_equal(pixels(data[:2] + segment(0xE1, body) + data[2:]), upright)
    data = encode(scene(3), "WEBP", icc_profile=bytes(10))  # the extended format
    kind = b"EXIF" if body.startswith(b"Exif") else b"XMP "
    riff = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    np.testing.assert_array_equal(pixels(data + riff), np.rot90(pixels(data), -1))


@pytest.mark.parametrize(
    "extra", [b"EXIF\xff\xff\xff\xff", b"XMP \x05\0\0\0<x", b"zzzz\4\0\0\0abcd", b"EXIF", bytes(3)]
)
def test_damaged_webp_metadata_costs_nothing(extra):
    data = encode(scene(3), "WEBP")
    np.testing.assert_array_equal(pixels(data + extra), pixels(data))
    profiled = encode(scene(3), "WEBP", icc_profile=bytes(400))
    place = profiled.index(b"ICCP") + 4
    for length in (bytes(4), b"\x99\1\0\0", b"\xff\xff\xff\x7f"):
        damaged = profiled[:place] + length + profiled[place + 4 :]
        np.testing.assert_array_equal(pixels(damaged), pixels(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_of_every_format(kind, orientation):
    from PIL import ImageOps

    options = {"lossless": True} if kind == "WEBP" else {}
    image = scene(4, 96, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(__import__("io").BytesIO(encode(image, kind, exif=exif, **options)))
    expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(pixels(encode(image, kind, exif=exif, **options)), expected)


def test_an_orientation_alone_can_be_put_back():
    data = strip_jpeg(encode(scene(4, 96, 64), "JPEG")).data
    for orientation in range(1, 9):
        assert strip_jpeg(with_orientation(data, orientation)).orientation == orientation
        opened = Image.open(__import__("io").BytesIO(with_orientation(data, orientation)))
        assert opened.getexif()[0x0112] == orientation


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_no_metadata_makes_the_orientation_fail(exif, xmp):
    assert 1 <= orientation_of(b"II*\0" + exif, b"tiff:Orientation=" + xmp) <= 8


# ---------------------------------------------------------------- damage anywhere

FILES = {
    "JPEG": encode(scene(5), "JPEG", exif=exif_of(6), comment=b"a comment"),
    "progressive": encode(scene(5), "JPEG", progressive=True),
    "restarts": encode(scene(5), "JPEG", restart_marker_rows=1),
    "PNG": encode(scene(5), "PNG", exif=exif_of(6)),
    "WEBP": encode(scene(5), "WEBP", exif=exif_of(6)),
    "BMP": encode(scene(5, 40, 30), "BMP"),
    "GIF": encode(scene(5).quantize(), "GIF"),
    "TIFF": encode(scene(5, 40, 30), "TIFF", exif=exif_of(6)),
    "TIFF deflate": encode(scene(5), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF JPEG": encode(scene(5), "TIFF", compression="jpeg"),
}
DAMAGE = st.tuples(
    st.sampled_from(["flip", "zeros", "noise", "cut", "remove", "insert"]),
    st.floats(0, 1),
    st.integers(1, 64),
    st.integers(0, 255),
)


def damaged(data: bytes, damage: tuple[str, float, int, int]) -> bytes:
    how, where, length, value = damage
    place = int(where * (len(data) - 1))
    rest = data[place + length :]
    middle = {
        "flip": bytes(byte ^ (value or 1) for byte in data[place : place + length]),
        "zeros": bytes(length),
        "noise": np.random.default_rng(value).bytes(length),
        "cut": b"",
        "remove": b"",
        "insert": bytes([value]) * length + data[place : place + length],
    }[how]
    return data[:place] + middle + (b"" if how == "cut" else rest)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None)
@given(damage=DAMAGE)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_is_told_in_one_line_and_what_looks_whole_decodes(name, damage):
    data = damaged(FILES[name], damage)
    scans = data.find(b"\xff\xda") + 14
    try:
        file = encoded(data)
        image = decode(file, Reading(max_pixels=10**6)).image
    except Exception as error:
        reason = reason_of(error)
        assert reason and reason.isprintable()
        # What is called whole goes to a GPU as it is, and a failure there costs a batch: only
        # tables and headers, of which a progressive file has more, may be damaged unnoticed.
        if name in ("JPEG", "restarts") and data[:scans] == FILES[name][:scans]:
            assert not file.whole, reason
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_damage_within_metadata_never_costs_an_image(name):
    """Every byte of the metadata, lengths too, overwritten in turn."""
    data = FILES[name]
    marks = {"JPEG": (b"\xff\xe1", b"\xff\xdb"), "PNG": (b"eXIf", b"IDAT"), "WEBP": (b"EXIF", b"")}
    begin, end = (data.index(mark) if mark else len(data) for mark in marks[name])
    begin, end = {"JPEG": (begin, end), "PNG": (begin - 4, end - 4), "WEBP": (begin, end)}[name]
    whole = pixels(data)
    turned = np.rot90(whole)
    for place in range(begin, end):
        if name == "JPEG" and place in (begin, begin + 1):
            continue  # another marker is no longer metadata
        for value in (0, 0xFF, data[place] ^ 1):
            made = pixels(data[:place] + bytes([value]) + data[place + 1 :])
            sideways = made.shape != whole.shape
            np.testing.assert_array_equal(made, turned if sideways else made)
            assert sideways or np.abs(made.astype(int) - whole).mean() < 80


# ---------------------------------------------------------------- values


def sixteen(values: np.ndarray, kind: str = "PNG") -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16)), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("top", [255, 4095])
def test_a_narrow_range_is_said_and_a_stated_one_is_used(kind, top):
    ramp = np.linspace(0, top, 96 * 80).round().reshape(80, 96)
    with pytest.warns(NarrowRangeWarning, match=f"values from 0 to {top} becomes"):
        dark = decode_rgb(sixteen(ramp, kind))
    assert np.asarray(dark).max() <= 15
    used = np.asarray(decode_rgb(sixteen(ramp, kind), Reading(value_range=(0, top))))
    np.testing.assert_allclose(used[..., 0], ramp * 255 / top, atol=0.51)
    with pytest.warns(NarrowRangeWarning):
        decode_rgb(sixteen(ramp, kind), Reading(value_range=(top, 65535)))


def test_sixteen_bit_colours_use_a_stated_range_too():
    """Pillow does not write them, so the file is made here."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4096, (40, 30, 3))
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 30, 40, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    with pytest.warns(NarrowRangeWarning, match="values from 0 to 3840 becomes 16 of 256 levels"):
        decode_rgb(data)
    used = np.asarray(decode_rgb(data, Reading(value_range=(0, 4095))))
    np.testing.assert_allclose(used, values * 255 / 4095, atol=0.51)


def test_floating_point_needs_a_stated_range():
    data = encode(
        Image.fromarray(np.linspace(-1, 3, 400, dtype=np.float32).reshape(20, 20)), "TIFF"
    )
    with pytest.raises(ValueError, match="state one by value_range"):
        decode_rgb(data)
    used = np.asarray(decode_rgb(data, Reading(value_range=(-1, 3))))
    assert used.min() == 0 and used.max() == 255


@pytest.mark.parametrize("stated", [(0, 0), (5, 1), (0, float("inf")), (float("nan"), 1)])
def test_a_stated_range_is_checked(stated):
    with pytest.raises(ValueError, match="value_range must be two finite numbers, low < high"):
        Reading(value_range=stated)


def test_names_are_escaped_for_terminals():
    assert printable("a b\u00e9\u4e2d.jpg") == "a b\u00e9\u4e2d.jpg"
    assert printable("x\x1b[2J\r\n\x07.jpg") == "x\\x1b[2J\\r\\n\\x07.jpg"
    assert printable("gpj.\u202e\udcff") == "gpj.\\u202e\\udcff"


def test_png_text_of_pillows_own_is_read():
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", raw_profile(exif_of(3)).decode(), zip=True)
    np.testing.assert_array_equal(
        pixels(encode(scene(1), "PNG", pnginfo=info)), pixels(encode(scene(1), "PNG"))[::-1, ::-1]
    )
