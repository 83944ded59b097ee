"""Pictures side by side: which LoRAs at which strengths, and the grid with its labels."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .errors import ZTurboError

WITHOUT = "without"
MOST = 500  # pictures: more is a slip of the pen
PIXELS = 128_000_000  # of all pictures together: 122 of 1024 x 1024, which take 4 GB of memory
STRENGTHS = (-10.0, 10.0)
INK, PAPER = "#e8e8e8", "#1c1c1c"
SIDE = 0.28  # width of the prompts' column, of a picture's


@dataclass(frozen=True)
class Column:
    """One LoRA at one strength. lora: its name; empty for clean turbo."""

    lora: str
    strength: float

    @property
    def label(self) -> str:
        return f"{self.lora} at {self.strength:g}" if self.lora else WITHOUT


def read_strengths(text: str) -> tuple[float, ...]:
    """Of "0.6, 1": each once, in their order. Raises ZTurboError."""
    low, high = STRENGTHS
    if re.fullmatch(r"\s*-?\d,\d+\s*", text) and text.strip().startswith(("0,", "-0,")):
        whole, part = text.strip().split(",")
        raise ZTurboError(
            f"strengths {text!r} are two, {whole} and {part}. For one write {whole}.{part}, with a point."
        )
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.replace(";", ",").split(",") if part.strip()))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(one) and low <= one <= high for one in found):
        raise ZTurboError(
            f"strengths is {text[:60]!r}; it must be numbers from {low:g} to {high:g} with commas between: 0.6, 1."
        )
    return found


def columns(
    loras: list[str], strengths: tuple[float, ...], without: bool, prompts: int, size: tuple[int, int]
) -> list[Column]:
    """All columns, from left to right. prompts: their number; size: (width, height) of a picture, pixels.

    Raises ZTurboError for nothing, and for far too much.
    """
    if size[0] % 16 or size[1] % 16:
        raise ZTurboError(f"The size is {size[0]}x{size[1]}; width and height must be multiples of 16.")
    found = [Column(lora, strength) for lora in loras for strength in strengths]
    if not found:
        raise ZTurboError(
            "There is nothing to compare. Write a file of models/loras or the name of a run into loras, one a line, "
            "or connect one to lora."
        )
    found = [Column("", 0.0), *found] if without else found
    if not prompts:
        raise ZTurboError("There are no prompts. Write some, one a line.")
    most = min(MOST, PIXELS // (size[0] * size[1]))
    if (pictures := len(found) * prompts) > most:
        raise ZTurboError(
            f"{len(found)} columns of {prompts} prompts are {pictures} pictures; of {size[0]}x{size[1]} pixels at most "
            f"{most} are drawn at once. Take fewer LoRAs, strengths or prompts, or smaller pictures."
        )
    return found


def grid(rows: list[list[np.ndarray]], across: list[str], down: list[str]) -> torch.Tensor:
    """IMAGE [1, H, W, 3] in 0..1 of rows of pictures [h, w, 3] uint8 of one size, with a label on each column and row.

    A label that the font has no letters for gives way to its number.
    """
    height, width = rows[0][0].shape[:2]
    letters = max(11, min(28, width // 22))  # pixels
    font = ImageFont.load_default(letters)
    side, line = max(90, round(SIDE * width)), round(1.35 * letters)
    gap = max(2, width // 128)
    heads = [_wrapped(text, font, width - 2 * gap) for text in _numbered(across)]
    sides = [_wrapped(text, font, side - 2 * gap) for text in _numbered(down)]
    top = line * max(map(len, heads)) + 2 * gap
    whole = Image.new("RGB", (side + len(across) * (width + gap), top + len(down) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(whole)
    for x, lines in enumerate(heads):
        draw.multiline_text((side + x * (width + gap) + gap, gap), "\n".join(lines), INK, font, spacing=line - letters)
    for y, row in enumerate(rows):
        down_to = top + y * (height + gap)
        shown = sides[y][: max(1, height // line)]
        draw.multiline_text((gap, down_to + gap), "\n".join(shown), INK, font, spacing=line - letters)
        for x, picture in enumerate(row):
            whole.paste(Image.fromarray(picture), (side + x * (width + gap), down_to))
    pixels = np.array(whole, dtype=np.float32)
    pixels /= 255.0
    return torch.from_numpy(pixels)[None]


def _numbered(texts: list[str]) -> list[str]:
    return [text if _drawable(text) else f"({number})" for number, text in enumerate(texts, 1)]


def _drawable(text: str) -> bool:
    """Has the font that comes with Pillow these letters?"""
    return all(" " <= letter <= "\u00ff" for letter in text)


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines of at most `width` pixels; what is longer than one by itself is cut."""
    lines: list[str] = []
    for word in text.split(" "):
        while word and font.getlength(word) > width:
            fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
            lines.append(word[:fits])
            word = word[fits:]
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        elif word:
            lines.append(word)
    return lines or [""]
