"""Pictures about pictures: the contact sheet of a dataset, and curves."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .dataset import Dataset

CELL = 160  # pixels
COLORS = ("#2b8a3e", "#d9480f", "#1864ab", "#862e9c", "#5c940d", "#495057")


def contact_sheet(dataset: Dataset, columns: int = 6, most: int = 36) -> torch.Tensor:
    """IMAGE [1, H, W, 3] in 0..1: the first pictures as they will be trained, cropped to their buckets."""
    trained = [(item.pixels() * 255).round().astype(np.uint8) for item in dataset.items[:most]]
    return sheet([Image.fromarray(pixels) for pixels in trained], columns)


def sheet(pictures: list[Image.Image], columns: int = 6) -> torch.Tensor:
    """IMAGE [1, H, W, 3] in 0..1 of all these pictures, made small."""
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (min(columns, len(pictures)) * CELL, rows * CELL), (32, 32, 32))
    for number, picture in enumerate(pictures):
        picture.thumbnail((CELL - 8, CELL - 8))
        x, y = number % columns * CELL, number // columns * CELL
        whole.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
    return torch.from_numpy(np.asarray(whole, dtype=np.float32) / 255.0)[None]


def curves(
    series: dict[str, list[tuple[float, float]]],
    title: str,
    across: str,
    size: tuple[int, int] = (900, 520),
    bands: dict[str, list[tuple[float, float, float]]] | None = None,
) -> Image.Image:
    """Lines of (x, y) in one frame, with their names, the axes' ends and a grid.

    `across` names x; bands: (x, low, high) around a line, by its name.
    """
    bands = bands or {}
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)
    left, top, right, bottom = 80, 50, size[0] - 30, size[1] - 60
    points = [point for line in series.values() for point in line]
    points += [(x, y) for band in bands.values() for x, *ends in band for y in ends]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points))
    y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0) or y1 + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (x - x0) / ((x1 - x0) or 1), bottom - (bottom - top) * (y - y0) / (y1 - y0)

    draw.text((left, 14), title, "black", font)
    for n in range(5):
        x, y = x0 + n * (x1 - x0) / 4, y0 + n * (y1 - y0) / 4
        draw.line((*place(x, y0), *place(x, y1)), "#e4e4e4")
        draw.line((*place(x0, y), *place(x1, y)), "#e4e4e4")
        draw.text((place(x, y0)[0], bottom + 8), f"{x:g}", "#444", font, anchor="ma")
        draw.text((left - 8, place(x0, y)[1]), f"{y:.4g}", "#444", font, anchor="rm")
    draw.text(((left + right) / 2, size[1] - 24), across, "#444", font, anchor="ma")
    draw.rectangle((left, top, right, bottom), outline="#888")
    shade = Image.new("RGBA", size, (0, 0, 0, 0))
    for n, name in enumerate(series):
        band = bands.get(name, [])
        edge = [place(x, high) for x, _, high in band] + [place(x, low) for x, low, _ in reversed(band)]
        if len(band) > 1:
            layer = Image.new("RGBA", size, (0, 0, 0, 0))
            ImageDraw.Draw(layer).polygon(edge, COLORS[n % len(COLORS)] + "30")
            shade = Image.alpha_composite(shade, layer)
    image.paste(shade, mask=shade)
    for n, (name, line) in enumerate(series.items()):
        color = COLORS[n % len(COLORS)]
        draw.line([place(*point) for point in line], color, 3, joint="curve")
        draw.text((right - 12, top + 10 + 22 * n), name, color, font, anchor="ra")
    return image
