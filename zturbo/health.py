"""How turbo a model with a LoRA still is, and the reference trajectories on which it is kept so.

Clean turbo walks its own 8-step trajectory for prompts that have nothing to do with what is trained. At the states of
that trajectory the velocities of turbo with the LoRA are compared with its own: what a LoRA changes there, it changes
in pictures that nobody asked it to change.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import flow
from .family import Family

PROMPTS = (
    "a photo of a red bicycle leaning against a brick wall",
    "an oil painting of a stormy sea with a small sailing boat",
    "a close-up of a bowl of strawberries on a wooden table",
    "a snowy mountain village at night, lights in the windows",
    "a black and white photo of an old man reading a newspaper",
    "a shop window with a sign that says OPEN",
    "a watercolor of a fox in an autumn forest",
    "an astronaut walking through a field of sunflowers",
    "a modern kitchen with a large window, morning light",
    "a portrait of a woman with curly hair and a green scarf",
    "a busy market street in the rain, people with umbrellas",
    "a glass of water on a marble counter, studio lighting",
    "a cartoon robot watering plants on a balcony",
    "a river delta from above at sunset",
    "a wooden chair in an empty white room",
    "a cat asleep on a pile of books",
    "two children building a sand castle, film photograph",
    "a steam train crossing a stone bridge",
    "a pencil drawing of a pair of hands",
    "a bowl of ramen with an egg and spring onions, from above",
    "a lighthouse on a cliff, stormy sky",
    "an isometric drawing of a small bookshop",
    "a yellow taxi in heavy traffic, neon signs at night",
    "a macro photo of a dew drop on a leaf",
    "a white horse running along a beach",
    "a poster with a blue mountain and the word NORTH",
    "a jazz band playing in a smoky bar",
    "an old leather suitcase full of postcards",
    "a young man in a suit waiting for the subway",
    "a ceramic vase with dried flowers against a gray wall",
    "a castle made of glass on a floating island",
    "a dog looking out of a car window",
)
WATCHED = 8  # prompts of the gauge; guard and restoring take the others
HIGH = 3  # the first states of a trajectory, at noise levels from 1 to 0.9: prompts take turns in them for the gauge
# At which mean deviation the gauge reads 1 - 1/e, and how steeply it gets there: as measured on the tiny turbo, see
# docs/RESULTS.md
DRIFT, STEEPNESS = 0.28, 3
HEALTHY = 0.1  # what the gauge reads at most while turbo is called healthy
ANCHORS = 4  # states of each set of trajectories that a step looks at
# (x_t, sigma, prompt numbers) -> v
VelocityOfPrompts = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Trajectories:
    """Reference trajectories: S states of the sampling path of each of P prompts, with the model's velocities there.

    numbers: of the prompts. sigmas: [P, S]; states and velocities: [P, S, C, h, w] on the CPU, in fp32.
    """

    numbers: tuple[int, ...]
    sigmas: torch.Tensor
    states: torch.Tensor
    velocities: torch.Tensor

    def one_each(self) -> "Trajectories":
        """One state of each prompt: the first of the first, the second of the second, and so on, round again."""
        rows = torch.arange(len(self.numbers))
        places = rows % self.sigmas.shape[1]
        found = (tensor[rows, places][:, None] for tensor in (self.sigmas, self.states, self.velocities))
        return Trajectories(self.numbers, *found)

    def numbered_from(self, first: int) -> "Trajectories":
        """The same, of prompts whose numbers are higher by `first`."""
        return replace(self, numbers=tuple(first + number for number in self.numbers))


@torch.no_grad()
def walk(
    family: Family,
    velocity: VelocityOfPrompts,
    numbers: tuple[int, ...],
    size: tuple[int, int],
    seed: int,
    device,
    steps: int | None = None,
) -> Trajectories:
    """Trajectories of these prompts by Euler's method, as turbo samples, one after the other.

    size: (h, w) of the latents. steps: the first so many; None: all.
    """
    steps = steps or family.steps
    grid = family.sigmas()[: steps + 1]
    states, velocities = torch.empty(2, len(numbers), steps, family.channels, *size)
    for row, number in enumerate(numbers):
        x = torch.randn(1, family.channels, *size, generator=flow.generator(seed, "health", number)).to(device)
        for place, (high, low) in enumerate(zip(grid, grid[1:])):
            v = velocity(x, high[None].to(device), (number,)).float()
            states[row, place], velocities[row, place] = x[0], v[0]
            x = x + v * (low - high)
    return Trajectories(numbers, grid[:-1].expand(len(numbers), -1), states, velocities)


@torch.no_grad()
def velocities(reference: Trajectories, velocity: VelocityOfPrompts, device) -> torch.Tensor:
    """[P, S, C, h, w] fp32 on the CPU: another model's velocities at the states of these trajectories."""
    found = torch.empty_like(reference.velocities)
    for row, number in enumerate(reference.numbers):
        for place, (sigma, x) in enumerate(zip(reference.sigmas[row], reference.states[row])):
            found[row, place] = velocity(x[None].to(device), sigma[None].to(device), (number,))[0]
    return found


def deviations(reference: Trajectories, velocity: VelocityOfPrompts, device) -> torch.Tensor:
    """[P, S]: how far the velocity is from clean turbo's at each state, relative to it: |v - v0| / |v0|."""
    changed = velocities(reference, velocity, device) - reference.velocities
    return changed.flatten(2).norm(dim=2) / reference.velocities.flatten(2).norm(dim=2)


def high(deviations: torch.Tensor) -> float:
    """Of deviations [P, S >= HIGH] the mean of those that the gauge looks at."""
    rows = torch.arange(len(deviations))
    return deviations[rows, rows % HIGH].mean().item()


def gauge(deviation: float) -> float:
    """0: turbo untouched; 1: broken. deviation: the mean at the gauge's states.

    The number is the share of unrelated pictures that such a deviation makes go wrong.
    """
    return 1 - math.exp(-((deviation / DRIFT) ** STEEPNESS))


def sharpness(images: torch.Tensor) -> float:
    """Mean square of the Laplacian of images [B, H, W, 3] in 0..1: what blur takes away first."""
    middle = images[:, 1:-1, 1:-1]
    around = images[:, :-2, 1:-1] + images[:, 2:, 1:-1] + images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return (4 * middle - around).square().mean().item()


def anchors(reference: Trajectories, *counters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(states, sigmas, velocities, prompt numbers) of ANCHORS states, evenly over the noise levels.

    They are a function of the counters.
    """
    random, states = flow.generator("guard", *counters), reference.sigmas.shape[1]
    places = (torch.randint(states, (), generator=random) + torch.arange(ANCHORS) * states // ANCHORS) % states
    rows = torch.randint(len(reference.numbers), (ANCHORS,), generator=random)
    return (
        reference.states[rows, places],
        reference.sigmas[rows, places],
        reference.velocities[rows, places],
        tuple(reference.numbers[row] for row in rows.tolist()),
    )
