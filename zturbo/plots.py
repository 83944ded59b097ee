"""Pictures about pictures: the contact sheet of a dataset."""

import numpy as np
import torch
from PIL import Image

from .dataset import Dataset

CELL = 160  # pixels


def contact_sheet(dataset: Dataset, columns: int = 6, most: int = 36) -> torch.Tensor:
    """IMAGE [1, H, W, 3] in 0..1: the first pictures as they will be trained, cropped to their buckets."""
    items = dataset.items[:most]
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (min(columns, len(items)) * CELL, rows * CELL), (32, 32, 32))
    for number, item in enumerate(items):
        picture = Image.fromarray((item.pixels() * 255).round().astype(np.uint8))
        picture.thumbnail((CELL - 8, CELL - 8))
        x, y = number % columns * CELL, number // columns * CELL
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255.0)[None]
