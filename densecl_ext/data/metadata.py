"""Image files without their metadata, and the one thing that metadata is needed for.

EXIF, XMP, colour profiles, comments and previews are what cameras, editors and uploads damage most,
and a decoder that trips over them loses an image whose pixels are whole. So they never reach one:
JPEG, PNG and WebP files are copied without them, and the orientation is read here, forgivingly.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])")
_XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"
# A text chunk may inflate a thousandfold.
_MAX_TEXT = 1 << 22


class Stripped(NamedTuple):
    """A file without metadata.

    Attributes:
        data: The file's bytes without them.
        orientation: EXIF's, 1 to 8: 1 is upright, from 5 on width and height swap.
        whole: Whether everything that can be checked without decoding is in order.
    """

    data: bytes
    orientation: int
    whole: bool


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """The orientation that EXIF states, else XMP, else 1.

    Args:
        exif: A TIFF structure, possibly damaged, possibly behind EXIF's own mark.
        xmp: An XMP packet, possibly damaged.

    Returns:
        1 to 8.
    """
    start = exif.find(b"II*\0", 0, 16)
    start = exif.find(b"MM\0*", 0, 16) if start < 0 else start
    if start >= 0:
        tiff = exif[start:]
        order = "<" if tiff[:1] == b"I" else ">"
        try:
            (first,) = struct.unpack_from(order + "I", tiff, 4)
            (count,) = struct.unpack_from(order + "H", tiff, first)
            for place in range(first + 2, first + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(order + "HH", tiff, place)
                if tag == 0x0112:
                    (value,) = struct.unpack_from(
                        order + ("I" if kind == 4 else "H"), tiff, place + 8
                    )
                    if 1 <= value <= 8:
                        return value
                    break
        except struct.error:  # cut off
            pass
    stated = _XMP_ORIENTATION.search(xmp)
    return int(stated[1]) if stated else 1


# ---------------------------------------------------------------- JPEG

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NEEDED = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, 0xDC}  # frames, tables, restart interval, lines
_DROPPED = frozenset((*range(0xE0, 0xF0), 0xFE))  # APPn and comments


class _Segment(NamedTuple):
    marker: int
    start: int  # of the marker
    end: int


def _segments(data: bytes, start: int) -> Iterator[_Segment]:
    """Segments from `start` up to the first scan's, as long as one follows the other."""
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # padding
            start += 1
            continue
        if marker not in _NEEDED and marker not in _DROPPED and marker != _SOS:
            return
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if end < start + 4 or end > len(data):
            return
        yield _Segment(marker, start, end)
        if marker == _SOS:
            return
        start = end


def _resynchronised(data: bytes, start: int) -> list[_Segment]:
    """The segments of the largest image whose header begins anywhere behind a damaged segment.

    The largest, since previews are images too.
    """
    best: list[_Segment] = []
    most = 0
    last = data.rfind(b"\xff\xda")
    seen = start
    while 0 <= start < last:
        chain = list(_segments(data, start)) if start >= seen else []
        if chain and chain[-1].marker == _SOS:
            seen = chain[-1].end
            frame = [segment for segment in chain if segment.marker in _FRAMES]
            area = 0
            if frame:
                height, width = struct.unpack_from(">HH", data, frame[0].start + 5)
                area = height * width
            if area > most:
                best, most = chain, area
        start = data.find(b"\xff", start + 1)
    return best


def _entropy_whole(data: bytes, start: int, restarts: bool) -> bool:
    """Whether scans hold nothing but coded data, markers in turn, and an end."""
    expected = 0
    while True:
        start = data.find(b"\xff", start)
        if start < 0 or start + 1 >= len(data):
            return False
        marker = data[start + 1]
        if marker == _EOI:
            return True
        if 0xD0 <= marker <= 0xD7:
            if not restarts or marker - 0xD0 != expected:
                return False
            expected = (expected + 1) % 8
        elif marker == 0xFF:
            start += 1
            continue
        elif marker != 0:  # progressive: the next scan's tables and header
            if marker not in _NEEDED and marker not in _DROPPED and marker != _SOS:
                return False
            length = int.from_bytes(data[start + 2 : start + 4], "big")
            if length < 2:
                return False
            start += length
            expected = 0 if marker == _SOS else expected
        start += 2


def strip_jpeg(data: bytes) -> Stripped:
    """A JPEG file without APPn segments and comments, except those that tell its colours.

    Args:
        data: The file.

    Returns:
        The stripped file; `whole` is False where scans look cut or overwritten.
    """
    exif = xmp = b""
    kept = [b"\xff\xd8"]
    restarts = whole = False
    start, frame = 2, False
    while True:
        chain = list(_segments(data, start))
        if not (chain and chain[-1].marker == _SOS):
            behind = chain[-1].end if chain else start
            rest = _resynchronised(data, behind)
            if not rest and chain:
                rest = _resynchronised(data, chain[-1].start + 2)
                chain = chain[:-1]
            if not rest:
                return Stripped(data, 1, False)
            chain += rest
        break
    for marker, start, end in chain:
        body = data[start + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0"):
            exif = exif or body
        elif marker == 0xE1 and body.startswith(_XMP_SEGMENT):
            xmp = xmp or body
        if marker == 0xDD:
            restarts = int.from_bytes(body[:2], "big") > 0
        frame |= marker in _FRAMES
        colour = (marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12) or (
            marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        )
        if marker not in _DROPPED or colour:
            kept.append(data[start:end])
    whole = frame and _entropy_whole(data, chain[-1].end, restarts)
    kept.append(data[chain[-1].end :])
    return Stripped(b"".join(kept), orientation_of(exif, xmp), whole)


def with_orientation(data: bytes, orientation: int) -> bytes:
    """A stripped JPEG file with an EXIF segment that holds an orientation alone.

    Args:
        data: The file.
        orientation: 1 to 8.

    Returns:
        The file with the segment as its first.
    """
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


# ---------------------------------------------------------------- PNG

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_PNG_FIND = re.compile(rb"PLTE|tRNS|IDAT|IEND")


def strip_png(data: bytes) -> Stripped:
    """A PNG file with its header, palette, transparency and pixels alone.

    Of an animation the first image stays.

    Args:
        data: The file.

    Returns:
        The stripped file; `whole` tells whether its checksums hold and its end is there.
    """
    exif = xmp = b""
    kept = [_PNG]
    start, whole = len(_PNG), True
    while start + 8 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 12 + length
        sound = end <= len(data) and _sound(data, start, end)
        if kind in _PNG_KEPT:
            # What is damaged here is for the decoder to judge.
            kept.append(data[start:end])
            whole &= sound
            if kind == b"IEND":
                return Stripped(b"".join(kept), orientation_of(exif, xmp), whole)
        else:
            body = data[start + 8 : end - 4]
            if kind == b"eXIf":
                exif = exif or body
            elif kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword, text = _png_text(kind, body)
                if keyword == b"Raw profile type exif":
                    exif = exif or _raw_profile(text)
                elif keyword == b"XML:com.adobe.xmp":
                    xmp = xmp or text
                elif keyword == b"Raw profile type xmp":
                    xmp = xmp or _raw_profile(text)
            if not sound:
                # Its length may be what is damaged: go on at the next chunk that is in order.
                end = min(end, next(_sound_chunks(data, start + 8), end))
        start = end
    return Stripped(b"".join(kept), orientation_of(exif, xmp), False)


def _sound(data: bytes, start: int, end: int) -> bool:
    view = memoryview(data)
    return zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")


def _sound_chunks(data: bytes, start: int) -> Iterator[int]:
    for found in _PNG_FIND.finditer(data, start + 4):
        begin = found.start() - 4
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        if end <= len(data) and _sound(data, begin, end):
            yield begin


def _inflated(data: bytes) -> bytes:
    """As much as inflates of possibly damaged data."""
    inflater, text = zlib.decompressobj(), b""
    try:
        for start in range(0, len(data), 256):
            text += inflater.decompress(data[start : start + 256], _MAX_TEXT)
            if len(text) >= _MAX_TEXT:
                break
    except zlib.error:
        pass
    return text


def _png_text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    keyword, _, text = body.partition(b"\0")
    if not (keyword.startswith(b"Raw profile type") or keyword == b"XML:com.adobe.xmp"):
        return keyword, b""
    if kind == b"zTXt":
        text = _inflated(text[1:])
    elif kind == b"iTXt":
        compressed, text = text[:1] == b"\1", text[2:]
        text = text.partition(b"\0")[2].partition(b"\0")[2]  # behind language and translation
        text = _inflated(text) if compressed else text
    return keyword, text


def _raw_profile(text: bytes) -> bytes:
    """ImageMagick's profiles: name, length, then hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    digits = re.match(rb"[0-9a-fA-F]*", digits)[0]  # type: ignore[index]  # always matches
    return bytes.fromhex(digits[: len(digits) & ~1].decode())


# ---------------------------------------------------------------- WebP

_WEBP_KEPT = frozenset((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"))
_WEBP_FIND = re.compile(rb"VP8 |VP8L|ALPH|ANIM|ANMF")


def strip_webp(data: bytes) -> Stripped:
    """A WebP file without colour profile, EXIF and XMP.

    Args:
        data: The file.

    Returns:
        The stripped file; `whole` tells whether its chunks lie inside the file.
    """
    exif = xmp = b""
    kept: list[bytes] = []
    start, size, whole = 12, 4, True
    pixels = False
    while start + 8 <= len(data):
        kind, length = (
            data[start : start + 4],
            int.from_bytes(data[start + 4 : start + 8], "little"),
        )
        end = start + 8 + length + length % 2
        if kind in _WEBP_KEPT:
            chunk = data[start:end]
            if kind == b"VP8X" and len(chunk) >= 9:
                chunk = chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:]
            kept.append(chunk)
            size += end - start
            whole &= end - length % 2 <= len(data)
            pixels |= kind in (b"VP8 ", b"VP8L", b"ANMF")
        else:
            if kind == b"EXIF":
                exif = exif or data[start + 8 : end]
            elif kind == b"XMP ":
                xmp = xmp or data[start + 8 : end]
            if not pixels and data[end : end + 4] not in _WEBP_KEPT | {b"ICCP", b"EXIF", b"XMP "}:
                found = _WEBP_FIND.search(data, start + 8)
                end = found.start() if found else end
        start = end
    header = b"RIFF" + struct.pack("<I", min(size, 0xFFFFFFFF)) + b"WEBP"
    return Stripped(header + b"".join(kept), orientation_of(exif, xmp), whole and pixels)
