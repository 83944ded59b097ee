"""A small network that reads a picture of the drawn world.

It tells which shape, colour, ground and size, and whether it is a concept's. Trained on drawn pictures as the tiny
autoencoder gives them back, so that it reads what models draw. Its features are what Fréchet distances are taken in.
"""

import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from . import concepts, pictures, world
from .setup import WEIGHTS, log, use_comfy

SIDE = 64  # pixels that it looks at
HEADS = {
    "shape": (*pictures.SHAPES, "smiley"),
    "color": tuple(pictures.COLORS),
    "ground": tuple(pictures.GROUNDS),
    "size": pictures.SIZES,
    "manner": ("plain", "outline", "stripes"),
}
FILE = WEIGHTS / "reader.safetensors"


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        widths, layers = (3, 32, 64, 96, 128), []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in HEADS.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 128] of images [N, 3, H, W] in 0..1."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.body(images * 2 - 1).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def labels(caption: str, concept: str = "") -> dict[str, str]:
    """What each head should say of a picture with this caption. Heads that the caption leaves open are absent."""
    words = [word for word in caption.split() if word not in concepts.TRIGGER.values()]
    if concept == "smiley":
        return {"shape": "smiley", "ground": words[-2], "manner": "plain"}
    found = {"size": words[1], "color": words[2], "shape": words[3], "ground": words[-2], "manner": concept or "plain"}
    return found


def load(device="cpu") -> Reader:
    reader = Reader()
    reader.load_state_dict({key: value.float() for key, value in load_file(FILE).items()})
    return reader.eval().requires_grad_(False).to(device)


@torch.no_grad()
def right(reader: Reader, images: torch.Tensor, wanted: list[dict[str, str]]) -> torch.Tensor:
    """[N] bool: every label of a picture is read as wanted."""
    said = {name: logits.argmax(-1) for name, logits in reader(images).items()}
    return torch.tensor(
        [
            all(HEADS[name][int(said[name][n])] == word for name, word in labels.items())
            for n, labels in enumerate(wanted)
        ]
    )


def drawn(count: int, seed: int, device, concepts_too: bool = True) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Pictures [N, 3, 64, 64] as the autoencoder gives them back, and their labels.

    Three of ten are of a concept, unless told otherwise.
    """
    rng, taesd, names = random.Random(seed), world.load_autoencoder(device), pictures.captions()
    images, wanted = [], []
    for start in range(0, count, 32):
        size, batch = rng.choice(concepts.SIZES), []
        for _ in range(min(32, count - start)):
            concept = rng.choice(concepts.DRAWN) if concepts_too and rng.random() < 0.3 else ""
            caption = concepts.caption(concept, rng) if concept else rng.choice(names)
            batch.append(
                np.asarray(concepts.draw(concept, caption, size, rng) if concept else pictures.draw(caption, size, rng))
            )
            wanted.append(labels(caption, concept))
        pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        with torch.no_grad():
            back = taesd.taesd_decoder(world.encode_pictures(taesd, pixels, device).to(device)).clamp(0, 1).cpu()
        images.append(F.interpolate(back, (SIDE, SIDE), mode="bilinear", antialias=True))
    return torch.cat(images), wanted


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab reader")
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    device = use_comfy()
    images, wanted = drawn(args.pictures, args.seed, device)
    log.info("%d pictures drawn", len(images))
    targets = {
        name: torch.tensor([words.index(one[name]) if name in one else -100 for one in wanted])
        for name, words in HEADS.items()
    }
    torch.manual_seed(args.seed)
    reader, generator = Reader().to(device), torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    started = time.time()
    for step in range(args.steps):
        pick = torch.randint(len(images), (64,), generator=generator)
        batch = images[pick] + 0.03 * torch.rand((), generator=generator) * torch.randn(
            64, 3, SIDE, SIDE, generator=generator
        )
        said = reader(batch.to(device))
        loss = sum(F.cross_entropy(logits, targets[name][pick].to(device)) for name, logits in said.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 250 == 249:
            log.info(
                "reader step %d loss %.4f, %.3f s/step", step + 1, loss.item(), (time.time() - started) / (step + 1)
            )
    save_file({key: value.half().contiguous() for key, value in reader.state_dict().items()}, FILE)
    fresh, asked = drawn(600, args.seed + 1, device)
    log.info(
        "reads %.1f %% of 600 fresh pictures right in every respect",
        100 * right(load(), fresh, asked).float().mean().item(),
    )
