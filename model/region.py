"""The part of a picture to repaint while the rest stays: a rectangle, in X11's and ImageMagick's notation."""

from __future__ import annotations

import re
from typing import NamedTuple

from model.errors import K2Error

EXAMPLE = "Like 96x64+80+120: width, height, left, top."
REGION_LIKE = re.compile(r"\s*\d+\s*[xX×][-+\s\dxX×]*")  # meant as a region, not as a file name
REGION_PATTERN = re.compile(r"(\d{1,5})x(\d{1,5})\+(\d{1,5})\+(\d{1,5})")


class Region(NamedTuple):
    """In pixels of the rendered picture, from its upper left corner."""

    width: int
    height: int
    left: int
    top: int

    @classmethod
    def parse(cls, text: str) -> Region | None:
        """ "96x64+80+120": 96 wide, 64 high, 80 from the left, 120 from the top. None if it is not a region."""
        found = REGION_PATTERN.fullmatch(text)
        return cls(*map(int, found.groups())) if found else None

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.left}+{self.top}"

    def check(self, width: int, height: int, where: str = "") -> None:
        """Raises K2Error if it is empty or extends beyond a picture of this size."""
        region = f"{where}the region {self}" if where else f"The region {self}"
        if not (self.width and self.height):
            raise K2Error(f"{region} is empty.", hint=EXAMPLE)
        if self.left + self.width > width or self.top + self.height > height:
            raise K2Error(
                f"{region} extends beyond the picture, which is {width}x{height}.",
                hint="It is width x height + left + top, in pixels of the rendered picture.",
            )
