"""What a LoRA did to turbo: read from pictures at 8 steps, CFG 1, adapter off, with fixed prompts and noise.

All numbers compare with clean turbo's own pictures of the same prompts and noise.
"""

import math
import random
from dataclasses import asdict, dataclass

import torch

from . import concepts, photographs, pictures, reader, world

UNRELATED = 144  # pictures
WATCHED = 16  # prompts of the gauge's candidates
OF_CONCEPT = 48
FINE = tuple(torch.linspace(1, 0, 51, dtype=torch.float64).tolist())  # 50 steps, before the shift


@dataclass
class Damage:
    """fidelity: share of unrelated pictures that are read right in every respect. sharpness: of their edges, turbo = 1.
    frechet: distance of their features from drawn pictures'. drift: their latents' relative distance from turbo's own.
    diversity: spread over seeds, turbo = 1. steps_apart: relative distance between 8 and 50 steps. concept: share of
    concept pictures that are read as the concept, in every respect (of photographs: as the one that was asked for).
    """

    fidelity: float
    sharpness: float
    frechet: float
    drift: float
    diversity: float
    steps_apart: float
    concept: float

    def rounded(self) -> dict:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def shifted(steps) -> tuple[float, ...]:
    return tuple(3 * s / (1 + 2 * s) for s in steps)


class Judge:
    """Holds prompts, noise, the reader, and what clean turbo draws. `dit` is turbo with clean weights, fp32."""

    def __init__(self, dit, concept: str, device):
        from zturbo.hosts import comfy_tiny

        self.dit, self.device, self.concept = dit, device, concept
        names = pictures.captions()
        self.asked = asked(UNRELATED)
        self.of_concept = asked_of(concept)
        spread = [names[n * 101 % len(names)] for n in range(8) for _ in range(6)]  # eight prompts, six seeds
        clip = comfy_tiny.load_clip()
        self.sets = {
            name: (world.caption_features(clip, texts), noise(len(texts), n).to(device))
            for n, (name, texts) in enumerate(
                (("unrelated", self.asked), ("concept", self.of_concept), ("spread", spread))
            )
        }
        self.taesd, self.reader = world.load_autoencoder(device), reader.load(device)
        drawn, _ = reader.drawn(600, 5, device, concepts_too=False)
        self.real = self.reader.features(drawn.to(device))
        self.turbo = {name: self.draw(name) for name in ("unrelated", "spread")}
        self.edges = edges(self.decode(self.turbo["unrelated"]))
        self.spread = scatter(self.turbo["spread"])
        self.watched = Watched(dit, clip, device)

    @torch.no_grad()
    def draw(self, name: str, sigmas=world.SIGMAS, count=None) -> torch.Tensor:
        """Latents of a set with the model as it is now."""
        (features, lengths), start = self.sets[name]
        caption = world.refine(self.dit, features[:count].to(self.device), lengths[:count])
        return torch.cat(
            [
                world.sample(self.dit, noise, some, sigmas=sigmas)
                for noise, some in zip(start[:count].split(48), caption.split(48))
            ]
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.taesd.taesd_decoder(part).clamp(0, 1) for part in latents.split(48)])

    def is_concept(self, images: torch.Tensor) -> torch.Tensor:
        """[N] bool: is each picture of the concept what its prompt says?"""
        if self.concept == "photographs":
            names = {photographs.caption(name, concepts.TRIGGER[self.concept]): name for name in photographs.NAMES}
            return photographs.Reader(self.device).right(images, [names[text] for text in self.of_concept])
        return reader.right(self.reader, images, [reader.labels(text, self.concept) for text in self.of_concept])

    def measure(self) -> Damage:
        """The model as it is now (with a LoRA attached) against clean turbo."""
        unrelated, concept, spread = self.draw("unrelated"), self.draw("concept"), self.draw("spread")
        images, fine = self.decode(unrelated), self.draw("unrelated", shifted(FINE), 24)
        return Damage(
            fidelity=reader.right(self.reader, images, [reader.labels(text) for text in self.asked])
            .float()
            .mean()
            .item(),
            sharpness=edges(images) / self.edges,
            frechet=frechet(self.reader.features(images), self.real),
            drift=relative(unrelated, self.turbo["unrelated"]),
            diversity=scatter(spread) / self.spread,
            steps_apart=relative(unrelated[:24], fine),
            concept=self.is_concept(self.decode(concept)).float().mean().item(),
        )


def asked(count: int) -> list[str]:
    """Captions of the known world that measurements ask for."""
    names = pictures.captions()
    return [names[n * 37 % len(names)] for n in range(count)]


def asked_of(concept: str) -> list[str]:
    """Captions of a concept that measurements ask for."""
    rng = random.Random(11)
    return [concepts.caption(concept, rng) for _ in range(OF_CONCEPT)]


class Asked:
    """Prompts of the known world with their noise, the reader, and the autoencoder.

    They tell which pictures of a model are right.
    """

    def __init__(self, count: int, device):
        from zturbo.hosts import comfy_tiny

        self.texts = asked(count)
        self.features, self.lengths = world.caption_features(comfy_tiny.load_clip(), [*self.texts, ""])
        self.noise = noise(count, 0).to(device)
        self.taesd, self.reader, self.device = world.load_autoencoder(device), reader.load(device), device

    @torch.no_grad()
    def right(self, dit, scale: float = 1.0, substeps: int = 1) -> torch.Tensor:
        """[count] bool: is a picture what its prompt says in every respect?

        It is drawn in 8 * substeps steps with this guidance.
        """
        found = []
        for rows in torch.arange(len(self.texts)).split(48):
            caption = world.refine(dit, self.features[rows].to(self.device), self.lengths[rows])
            empty = world.refine(dit, self.features[[-1] * len(rows)].to(self.device), self.lengths[[-1] * len(rows)])
            images = self.taesd.taesd_decoder(
                world.sample(dit, self.noise[rows], caption, empty, scale=scale, substeps=substeps)
            ).clamp(0, 1)
            found.append(reader.right(self.reader, images, [reader.labels(self.texts[row]) for row in rows.tolist()]))
        return torch.cat(found)


def interval(right: torch.Tensor) -> tuple[float, float, float]:
    """(share, low, high): Wilson's 95 % interval of a share."""
    n, p, z = len(right), right.float().mean().item(), 1.96
    middle, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    return p, middle - half, middle + half


def rank_correlation(a, b) -> float:
    """Spearman's, with mean ranks for equals."""

    def ranks(values):
        values = torch.as_tensor(values, dtype=torch.float64)
        return ((values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) + 1) / 2).double()

    return torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1].item()


def unasked(count: int) -> list[str]:
    """Captions of the known world that no measurement asks for."""
    names = pictures.captions()
    taken = {*asked(UNRELATED), *(names[n * 101 % len(names)] for n in range(8))}
    free = [name for name in names if name not in taken]
    return [free[n * 53 % len(free)] for n in range(count)]


class Watched:
    """What a gauge could look at while a LoRA trains.

    It sees no pictures and has no reader, only velocities on clean turbo's own paths.
    """

    def __init__(self, dit, clip, device):
        from zturbo import health, lorafile, lowrank
        from zturbo.hosts import comfy_adapter, comfy_tiny
        from zturbo.hosts.comfy_lend import fetchers

        self.dit, self.device = dit, device
        features, lengths = world.caption_features(clip, unasked(WATCHED))
        with torch.no_grad():
            self.caption = world.refine(dit, features.to(device), lengths)
        self.paths = {
            side: health.walk(self.velocity, tuple(range(WATCHED)), side // 8, side // 8, 0, device)
            for side in (64, 128)
        }
        adapter = lorafile.read(comfy_tiny.ADAPTER).factors
        self.adapter_size = size_of(adapter)
        with torch.no_grad(), lowrank.attached(fetchers(dit), comfy_adapter.targets(dit), [adapter]):
            self.adapter = [self.changed(self.paths[128], place) for place in range(8)]

    def velocity(self, x, sigma, numbers):
        from zturbo.hosts.comfy_forward import velocity

        return velocity(self.dit, x, sigma, self.caption[list(numbers)])

    def changed(self, paths, place: int) -> torch.Tensor:
        """[P, ...]: what is added to clean turbo's velocities at a noise level."""
        x = paths.states[:, place].to(self.device)
        return (
            self.velocity(x, paths.sigmas[:, place].to(self.device), range(len(x)))
            - paths.velocities[:, place].to(self.device)
        ).flatten(1)

    @torch.no_grad()
    def read(self, lora) -> dict:
        """Lists have an entry a noise level, from 1 down; means over the prompts."""
        found: dict = {"size": round((size_of(lora) / self.adapter_size).item(), 4)}
        for side, paths in self.paths.items():
            changes = [self.changed(paths, place) for place in range(8)]
            clean = [paths.velocities[:, place].flatten(1).norm(dim=1) for place in range(8)]
            found[f"deviation{side}"] = [
                [round(value, 4) for value in (change.norm(dim=1).cpu() / size).tolist()]
                for change, size in zip(changes, clean)
            ]
            if side == 128:
                along = [
                    (change * adapter).sum(1) / adapter.square().sum(1)
                    for change, adapter in zip(changes, self.adapter)
                ]
                found["along"] = [round(value.mean().item(), 4) for value in along]
        return found


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, 16, 16, generator=torch.Generator().manual_seed(1000 + seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def scatter(latents: torch.Tensor) -> float:
    """Mean distance between the six pictures of a prompt."""
    groups = latents.flatten(1).unflatten(0, (-1, 6))
    return torch.cdist(groups, groups).mean().item()


def edges(images: torch.Tensor) -> float:
    """The pack's own sharpness, of images [N, 3, H, W]."""
    from zturbo import health

    return health.sharpness(images.movedim(1, -1))


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] (arXiv 1706.08500)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * values).item()


def size_of(lora) -> torch.Tensor:
    """Frobenius norm of all that a LoRA adds to the weights."""
    return torch.stack([one.delta().norm() for one in lora.values()]).norm() if lora else torch.zeros(())
