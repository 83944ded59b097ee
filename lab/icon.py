"""The pack's pictures in the registry: the demo's face, and how eight steps come to it out of noise.

python dev.py lab icon
"""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .pictures import GROUNDS, SUPERSAMPLE, draw_smiley
from .setup import ROOT, log

ASSETS = ROOT / "assets"
ICON = (400, 400)
BANNER = (1680, 720)  # 21:9
STEPS = 8
DARK, LIGHT, DIM = (30, 32, 38), (240, 240, 238), (170, 172, 178)
GRAIN = 8  # pixels of a block of noise


class Middle(random.Random):
    """Chance that is always the mean."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def main(argv: list[str]):
    """argv: nothing."""
    ASSETS.mkdir(exist_ok=True)
    for name, image in (("icon", icon()), ("banner", banner())):
        image.save(ASSETS / f"{name}.png", optimize=True)
        log.info("%s: %d x %d", name, *image.size)


def icon() -> Image.Image:
    """The face, and a dot for each step under it."""
    width, height = (side * SUPERSAMPLE for side in ICON)
    image = Image.new("RGB", (width, height), GROUNDS["blue"])
    image.paste(face(width * 7 // 8), (width // 16, 0))
    pen, r = ImageDraw.Draw(image), width // 36
    for n in range(STEPS):
        x, y = width * (0.15 + 0.7 * n / (STEPS - 1)), height * 0.9
        pen.ellipse((x - r, y - r, x + r, y + r), fill=LIGHT)
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The steps from left to right, under the pack's name."""
    width, height = BANNER
    side, gap = 176, 24
    image = Image.new("RGB", BANNER, DARK)
    pen = ImageDraw.Draw(image)
    left, top = (width - STEPS * side - (STEPS - 1) * gap) // 2, 330
    pen.text((left, 110), "Z-Image Turbo LoRA", fill=LIGHT, font=ImageFont.load_default(112))
    for n in range(STEPS):
        image.paste(noised(face(side), 1 - n / (STEPS - 1)), (left + n * (side + gap), top))
    words = "Train a LoRA inside ComfyUI. Keep the 8 steps."
    pen.text((left, top + side + 56), words, fill=DIM, font=ImageFont.load_default(52))
    return image


def face(side: int) -> Image.Image:
    """The demo's concept on blue, side x side pixels."""
    return draw_smiley((side, side), "blue", Middle())


def noised(image: Image.Image, sigma: float) -> Image.Image:
    """(1 - sigma) x + sigma noise, in blocks."""
    cells = image.width // GRAIN
    noise = np.random.default_rng(0).integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return Image.blend(image, Image.fromarray(noise).resize(image.size, Image.Resampling.NEAREST), sigma)
