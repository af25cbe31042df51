"""The file formats of pictures, and the metadata that each can hold.

PNG has text chunks. WebP (lossless) and JPEG have EXIF, whose comment holds the A1111 text, and XMP, which also holds
the record, for which a PNG has a chunk of its own.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

from model import picture_file

SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
JPEG_QUALITY = 95  # of a JPEG
MAX_XMP = 4 << 20  # bytes; the record is most of what we write, and parsed, a byte becomes twenty
JPEG_SEGMENT = 65_000  # bytes that fit into one segment of a JPEG
RECORD_NS = "urn:k2:record"  # the namespace of the record in XMP
RDF_NS = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


def format_of(name: str) -> str | None:
    """The format that a file's name stands for; None if it is none of ours."""
    kind = picture_file.SUFFIXES.get("." + name.rpartition(".")[2].lower())
    return kind and kind.lower()


def encode(picture: Image.Image, format: str, *, parameters: str = "", xmp: str = "", record: str = "") -> bytes:
    """A picture as lossless WebP or as JPEG; empty metadata is left out, and so is a record that does not fit."""
    limit = JPEG_SEGMENT if format == "jpeg" else 1 << 30
    packets = [add_record(xmp, record).encode(), xmp.encode()] if xmp else []
    more: dict[str, Any] = {}
    if fitting := [packet for packet in packets if len(packet) <= limit]:
        more["xmp"] = fitting[0]
    if parameters and len(comment := exif(parameters)) <= limit:
        more["exif"] = comment
    buffer = io.BytesIO()
    if format == "webp":
        picture.save(buffer, "WEBP", lossless=True, exact=True, **more)
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, **more)
    return buffer.getvalue()


def exif(comment: str) -> bytes:
    """EXIF with a comment, encoded as A1111 and its readers do: UNICODE, big-endian."""
    table = Image.Exif()
    table[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"UNICODE\0" + comment.encode("utf-16-be")}
    # Pillow writes bytes as type 1 (BYTE), and the standard wants 7 (UNDEFINED) here.
    return table.tobytes().replace(b"\x92\x86\x00\x01", b"\x92\x86\x00\x07", 1)


def add_record(xmp: str, record: str) -> str:
    """An XMP packet with the record as an additional property."""
    from xml.sax.saxutils import quoteattr

    if not record:
        return xmp
    head, _, rest = xmp.partition(' rdf:about=""')
    return f'{head} rdf:about="" xmlns:k2="{RECORD_NS}" k2:record={quoteattr(record)}{rest}'


def record_from_xmp(info: Mapping[Any, Any]) -> str | None:
    """The record in the XMP of an opened picture, if it has one."""
    packet = info.get("xmp")
    if not isinstance(packet, bytes) or len(packet) > MAX_XMP:
        return None
    if b"<!" in packet:  # declarations, which no packet needs, can blow a parser up
        return None
    try:
        root = ElementTree.fromstring(packet.decode("utf-8").strip("\ufeff\0 \n"))
    except (ElementTree.ParseError, ValueError):
        return None
    found = (each.get(f"{{{RECORD_NS}}}record") for each in root.iter(f"{{{RDF_NS}}}Description"))
    return next(filter(None, found), None)
