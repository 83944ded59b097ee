"""Buckets: the size that a picture is trained at, and the resolutions that are asked for."""

import math

from .errors import DatasetError
from .family import Z_IMAGE

SMALLEST = 32  # pixels on the shorter side


def bucket(
    width: int, height: int, resolution: int, upscale: bool = False, grain: int = Z_IMAGE.grain
) -> tuple[int, int]:
    """The size to train at: the picture's aspect ratio at an area of resolution², in multiples of 16.

    The picture is enlarged only where `upscale` says so. Raises ValueError when the shorter side would fall under 32
    pixels.
    """
    scale = resolution / math.sqrt(width * height)
    factor = scale if upscale else min(1.0, scale)
    fit = lambda side: max(grain, round(side * factor / grain) * grain)  # noqa: E731
    size = fit(width), fit(height)
    if not upscale:
        size = min(size[0], width // grain * grain), min(size[1], height // grain * grain)
    if min(size) < SMALLEST:
        raise ValueError(f"{width}x{height} pixels is too small")
    return size


def cropped_share(width: int, height: int, size: tuple[int, int]) -> float:
    """Share of the area that a centre crop to size's aspect ratio cuts away."""
    have, want = width / height, size[0] / size[1]
    return 1 - min(have, want) / max(have, want)


def read_sides(text: str) -> tuple[int, ...]:
    """Resolutions, in pixels, with commas between. Raises DatasetError."""
    sides = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if not word.isdecimal() or len(word) > 4 or not 64 <= int(word) <= 4096:
            raise DatasetError(_no_resolution(word))
        sides.append(int(word))
    return tuple(sides)


def _no_resolution(word: str) -> str:
    return (
        f"{word!r} is no resolution. "
        "Give whole numbers of pixels from 64 to 4096 with commas between, for example 512, 768."
    )
