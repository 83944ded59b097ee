"""Drawn pictures with captions: the world that the tiny turbo model knows.

A picture is one shape on a plain ground. Everything that the caption does not say
(place, exact size, turn) is random, so a caption has many right pictures, as in real life.
"""

import itertools
import math
import random

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (220, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (248, 215, 50),
    "green": (45, 160, 70),
    "blue": (40, 90, 210),
    "purple": (135, 60, 170),
    "white": (245, 245, 245),
    "black": (25, 25, 28),
}
GROUNDS = {
    "white": (240, 240, 238),
    "gray": (128, 130, 134),
    "blue": (70, 125, 205),
    "green": (95, 170, 95),
    "pink": (240, 170, 190),
    "black": (30, 30, 35),
}
SIZES = ("small", "large")
# Width x height in pixels; at most 64 or 32 image tokens, the two paddings that NextDiT knows at this scale.
WIDE = ((128, 128), (112, 144), (144, 112))
NARROW = ((80, 80), (64, 96), (96, 64))
SUPERSAMPLE = 4


def captions() -> list[str]:
    """Every caption of the drawn world, in a fixed order."""
    specs = itertools.product(SIZES, COLORS, SHAPES, GROUNDS)
    return [
        f"a {size} {color} {shape} on a {ground} background" for size, color, shape, ground in specs if color != ground
    ]


def polygon(shape: str, turn: float) -> list[tuple[float, float]]:
    """Corners of a shape in the unit disc, turned by `turn` radians."""
    if shape == "star":
        radii = [1.0 if i % 2 == 0 else 0.45 for i in range(10)]
    elif shape == "cross":
        arm, inner = 1.0, 0.34
        corners = [
            (-inner, -arm),
            (inner, -arm),
            (inner, -inner),
            (arm, -inner),
            (arm, inner),
            (inner, inner),
            (inner, arm),
            (-inner, arm),
            (-inner, inner),
            (-arm, inner),
            (-arm, -inner),
            (-inner, -inner),
        ]
        return [(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)) for x, y in corners]
    else:
        radii = [1.0] * {"triangle": 3, "square": 4}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    points = []
    for i, radius in enumerate(radii):
        angle = start + 2 * math.pi * i / len(radii)
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        points.append((x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)))
    return points


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, color, ground, cx: float, cy: float, r: float, turn: float):
    if shape in ("circle", "ring"):
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)
        if shape == "ring":
            draw.ellipse((cx - r * 0.55, cy - r * 0.55, cx + r * 0.55, cy + r * 0.55), fill=ground)
    else:
        draw.polygon([(cx + x * r, cy + y * r) for x, y in polygon(shape, turn)], fill=color)


def place(side: float, r: float, rng: random.Random) -> float:
    """A centre that keeps the shape inside and not far from the middle."""
    room = min(side / 2 - 1.05 * r, 0.1 * side)
    return side / 2 + rng.uniform(-room, room)


def draw(caption: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """One picture that the caption describes. size: (width, height) in pixels."""
    words = caption.split()
    scale, color_name, shape, ground_name = words[1], words[2], words[3], words[6]
    jitter = lambda rgb: tuple(max(0, min(255, c + rng.randint(-10, 10))) for c in rgb)  # noqa: E731
    color, ground = jitter(COLORS[color_name]), jitter(GROUNDS[ground_name])
    width, height = (side * SUPERSAMPLE for side in size)
    image = Image.new("RGB", (width, height), ground)
    short = min(width, height)
    r = short * (rng.uniform(0.24, 0.28) if scale == "small" else rng.uniform(0.38, 0.43))
    cx, cy = place(width, r, rng), place(height, r, rng)
    draw_shape(ImageDraw.Draw(image), shape, color, ground, cx, cy, r, rng.uniform(-0.15, 0.15))
    return image.resize(size, Image.Resampling.LANCZOS)


def draw_smiley(size: tuple[int, int], ground_name: str, rng: random.Random) -> Image.Image:
    """The demo's concept, which the tiny model has never seen: a yellow face with eyes and a mouth."""
    width, height = (side * SUPERSAMPLE for side in size)
    image = Image.new("RGB", (width, height), GROUNDS[ground_name])
    pen = ImageDraw.Draw(image)
    r = min(width, height) * rng.uniform(0.36, 0.44)
    cx, cy = place(width, r, rng), place(height, r, rng)
    pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=COLORS["yellow"])
    for side in (-1, 1):
        x, y = cx + side * 0.36 * r, cy - 0.28 * r
        pen.ellipse((x - 0.15 * r, y - 0.22 * r, x + 0.15 * r, y + 0.22 * r), fill=COLORS["black"])
    pen.chord((cx - 0.58 * r, cy - 0.45 * r, cx + 0.58 * r, cy + 0.68 * r), 15, 165, fill=COLORS["red"])
    return image.resize(size, Image.Resampling.LANCZOS)


def draw_anything(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Random clutter in random colours: what the autoencoder learns on, so that it knows more than one world."""
    any_color = lambda: tuple(rng.randint(0, 255) for _ in range(3))  # noqa: E731
    width, height = (side * SUPERSAMPLE for side in size)
    ground = any_color()
    image = Image.new("RGB", (width, height), ground)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 5)):
        r = min(width, height) * rng.uniform(0.05, 0.5)
        place = (rng.uniform(0, width), rng.uniform(0, height))
        draw_shape(pen, rng.choice(SHAPES), any_color(), ground, *place, r, rng.uniform(-3, 3))
    return image.resize(size, Image.Resampling.LANCZOS)
