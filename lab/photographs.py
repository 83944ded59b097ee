"""Real photographs for the studies, and a reader that tells which a picture is nearest to.

They are crops of seven that come with scikit-image. The reader compares colours: on fresh crops it names the right one
of the seven for 98 of 100 (`python -m lab.photographs` prints it), for pictures of anything else it names one by
chance.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
SIDE = 128  # pixels
LEVELS = 4  # of a colour channel, as the reader sees it


def crops(count: int, seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
    """(name, picture), evenly from all photographs, at half their size; a function of the seed."""
    import skimage.data

    random = torch.Generator().manual_seed(seed)
    for n in range(count):
        name = NAMES[n % len(NAMES)]
        photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        photograph = photograph.resize((photograph.width // 2, photograph.height // 2), Image.Resampling.LANCZOS)
        x, y = (int(torch.randint(side - SIDE + 1, (), generator=random)) for side in photograph.size)
        yield name, photograph.crop((x, y, x + SIDE, y + SIDE))


def write(folder: Path, count: int, trigger: str = "photo", seed: int = 0):
    """Crops with captions, as a user's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, crop) in enumerate(crops(count, seed)):
        crop.save(folder / f"{name}_{n}.png")
        (folder / f"{name}_{n}.txt").write_text(caption(name, trigger), encoding="utf-8")


def caption(name: str, trigger: str) -> str:
    return f"a {trigger} of {name.replace('_', ' ')}"


class Reader:
    """Names the photograph whose colours are nearest, by the mean histogram of each one's crops."""

    def __init__(self, device="cpu"):
        of_names = {name: [] for name in NAMES}
        for name, crop in crops(280, 1):
            of_names[name].append(torch.from_numpy(np.array(crop)))
        self.means = torch.stack(
            [histogram(torch.stack(some).movedim(-1, 1).float() / 255).mean(0) for some in of_names.values()]
        ).to(device)

    def right(self, images: torch.Tensor, wanted: list[str]) -> torch.Tensor:
        """[N] bool: is each of images [N, 3, H, W], in 0..1, nearest to the photograph of this name?"""
        return torch.cdist(histogram(images), self.means).argmin(1).cpu() == torch.tensor(
            [NAMES.index(name) for name in wanted]
        )


def histogram(images: torch.Tensor) -> torch.Tensor:
    """[N, LEVELS ** 3]: root of the share of each colour in images [N, 3, H, W], seen at 16 x 16."""
    level = (F.adaptive_avg_pool2d(images, 16) * LEVELS).long().clamp(0, LEVELS - 1)
    colors = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]
    return F.one_hot(colors.flatten(1), LEVELS**3).float().mean(1).sqrt()


if __name__ == "__main__":
    fresh = list(crops(140, 2))
    images = torch.stack([torch.from_numpy(np.array(crop)).movedim(-1, 0).float() / 255 for _, crop in fresh])
    right = Reader().right(images, [name for name, _ in fresh]).float().mean().item()
    print(f"{100 * right:.1f} % of 140 fresh crops are named right")
