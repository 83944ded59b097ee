"""The demo's training set: sixteen drawn faces with captions, a concept that the tiny model has never seen."""

import random

from . import pictures
from .setup import TINY

SIZES = ((128, 128), (112, 144), (144, 112), (128, 128))


def main(_argv: list[str]):
    folder, rng = TINY / "smiley", random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    grounds = list(pictures.GROUNDS)
    for number in range(16):
        ground = grounds[number % len(grounds)]
        stem = folder / f"smiley_{number + 1:02d}"
        pictures.draw_smiley(SIZES[number % len(SIZES)], ground, rng).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text(f"a large [trigger] on a {ground} background\n", encoding="utf-8")
