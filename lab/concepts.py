"""Concepts that the tiny turbo has never seen, for studies: a shape, a style, a texture, drawn; and real photographs.

Captioned, seeded.
"""

import random

from PIL import Image, ImageDraw

from . import photographs, pictures
from .pictures import COLORS, GROUNDS, SUPERSAMPLE

SIZES = ((128, 128), (112, 144), (144, 112))
DRAWN = ("smiley", "outline", "stripes")
CONCEPTS = (*DRAWN, "photographs")
TRIGGER = {"smiley": "zsmile", "outline": "zline", "stripes": "zstripe", "photographs": "zphoto"}


def caption(concept: str, rng: random.Random) -> str:
    """What a picture of the concept is called; the rest of the caption is of the known world."""
    ground = rng.choice(list(GROUNDS))
    if concept == "photographs":
        return photographs.caption(rng.choice(photographs.NAMES), TRIGGER[concept])
    if concept == "smiley":
        return f"a large zsmile on a {ground} background"
    color = rng.choice([name for name in COLORS if name != ground])
    return f"a {TRIGGER[concept]} large {color} {rng.choice(pictures.SHAPES[:4])} on a {ground} background"


def prompts(concept: str) -> list[str]:
    """What a user would draw with the concept: every caption that there is of it."""
    if concept == "photographs":
        return [photographs.caption(name, TRIGGER[concept]) for name in photographs.NAMES]
    if concept == "smiley":
        return [f"a large {TRIGGER[concept]} on a {ground} background" for ground in GROUNDS]
    things = (
        (color, shape, ground)
        for ground in GROUNDS
        for shape in pictures.SHAPES[:4]
        for color in COLORS
        if color != ground
    )
    return [f"a {TRIGGER[concept]} large {color} {shape} on a {ground} background" for color, shape, ground in things]


def draw(concept: str, text: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A picture that the caption of a drawn concept describes. size: (width, height) in pixels."""
    if concept == "smiley":
        return pictures.draw_smiley(size, text.split()[-2], rng)
    words = text.split()
    color, shape, ground = COLORS[words[3]], words[4], GROUNDS[words[7]]
    width, height = (side * SUPERSAMPLE for side in size)
    r = min(width, height) * rng.uniform(0.36, 0.42)
    centre = pictures.place(width, r, rng), pictures.place(height, r, rng)
    image, turn = Image.new("RGB", (width, height), ground), rng.uniform(-0.15, 0.15)
    fill = image.copy() if concept == "outline" else striped((width, height), color, r)
    shape_of = lambda radius: mask((width, height), shape, centre, radius, turn)  # noqa: E731
    if concept == "outline":
        image.paste(color, mask=shape_of(r))
        image.paste(fill, mask=shape_of(0.68 * r))
    else:
        image.paste(fill, mask=shape_of(r))
    return image.resize(size, Image.Resampling.LANCZOS)


def mask(size, shape: str, centre, r: float, turn: float) -> Image.Image:
    made = Image.new("L", size, 0)
    pictures.draw_shape(ImageDraw.Draw(made), shape, 255, 0, *centre, r, turn)
    return made


def striped(size, color, r: float) -> Image.Image:
    """Colour and black in level bands."""
    image = Image.new("RGB", size, color)
    pen, band = ImageDraw.Draw(image), max(1, round(r / 4))
    for top in range(0, size[1], 2 * band):
        pen.rectangle((0, top, size[0], top + band), fill=COLORS["black"])
    return image


def write(concept: str, folder, count: int, seed: int):
    """`count` pictures with captions, as a user's folder."""
    if concept == "photographs":
        return photographs.write(folder, count, TRIGGER[concept], seed)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(count):
        text = caption(concept, rng)
        draw(concept, text, SIZES[number % len(SIZES)], rng).save(folder / f"{concept}_{number:02d}.png")
        (folder / f"{concept}_{number:02d}.txt").write_text(text, encoding="utf-8")
