"""The metadata inside a picture's file: its record, and the same in the forms that other tools read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image, PngImagePlugin

from k2cli import formats
from k2cli.fast_toml import dump

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SAMPLER_NAMES = {"euler": "Euler", "ab2": "AB2"}  # as galleries show them
XMP_KEYWORD = "XML:com.adobe.xmp"  # the keyword of XMP in a PNG


def encode(picture: Image.Image, record: Mapping[str, Any], *, embed: bool = True, format: str = "png") -> bytes:
    """The picture as a file of this format, with the record in the forms that other tools read."""
    if format != "png":
        texts = {"parameters": a1111_parameters(record), "xmp": xmp_packet(record), "record": dump(record).decode()}
        return formats.encode(picture, format, **(texts if embed else {}))
    info = PngImagePlugin.PngInfo()
    if embed:
        info.add_text("parameters", a1111_parameters(record))
        info.add_itxt("k2", dump(record).decode())
        info.add_itxt(XMP_KEYWORD, xmp_packet(record))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def a1111_parameters(record: Mapping[str, Any]) -> str:
    """The text that most galleries read, in A1111's form; its CFG scale is our guidance plus one."""
    prompt, settings, model = record["prompt"], record["settings"], record["model"]
    lines = [prompt["expanded"], f"Negative prompt: {prompt['avoid']}" if prompt["avoid"] else ""]
    facts = {
        "Steps": settings["steps"],
        "Sampler": SAMPLER_NAMES[settings.get("sampler") or "euler"],
        "CFG scale": f"{settings['guidance'] + 1:g}",
        **({"Denoising strength": f"{settings['denoise']:g}"} if settings.get("denoise") else {}),
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": next(iter(model["files"].values()))[:10],
        "Model": f"{Path(model['name']).stem}-{model['variant']}",
        "Version": f"k2 {record['versions']['k2']}",
    }
    return "\n".join([*filter(None, lines), ", ".join(f"{key}: {value}" for key, value in facts.items())])


def xmp_packet(record: Mapping[str, Any]) -> str:
    """The statement that a machine made this, in IPTC's terms (Photo Metadata Standard 2025.1)."""
    facts = {
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": f"k2, {Path(record['model']['name']).stem} {record['model']['variant']}",
        "Iptc4xmpExt:AISystemVersionUsed": record["versions"]["k2"],
        "Iptc4xmpExt:AIPromptInformation": record["prompt"]["expanded"],
        "xmp:CreatorTool": f"k2 {record['versions']['k2']}",
    }
    attributes = "\n    ".join(f"{name}={quoteattr(value)}" for name, value in facts.items())
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    {attributes}/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
