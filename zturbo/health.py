"""How turbo a model with a LoRA still is, and the paths on which it is kept so.

Clean turbo walks its own 8-step path for prompts that have nothing to do with what is trained. At the states of
that path the velocities of turbo with the LoRA are compared with its own: what a LoRA changes there, it changes in
pictures that nobody asked it to change.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import flow

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
HIGH = 3  # the first states of a path, at noise levels from 1 to 0.9: prompts take turns in them for the gauge
WORN = 0.28  # mean deviation at those at which 1 - 1/e of turbo is lost, and
STEEPNESS = 3  # how fast that comes: both as measured on the tiny turbo, see docs/RESULTS.md
HEALTHY = 0.1  # what the gauge reads at most while turbo is called healthy
GUARDED = 4  # states of each set of paths that a step looks at
Velocity = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Paths:
    """S states of each of P prompts' 8-step paths. sigmas: [P, S]; states and velocities: [P, S, 16, h, w] on the CPU, in fp32."""

    numbers: tuple[int, ...]  # of the prompts
    sigmas: torch.Tensor
    states: torch.Tensor
    velocities: torch.Tensor

    def one_each(self) -> "Paths":
        """One state of each prompt: the first of the first, the second of the second, and so on, round again."""
        rows = torch.arange(len(self.numbers))
        places = rows % self.sigmas.shape[1]
        return Paths(
            self.numbers, *(tensor[rows, places][:, None] for tensor in (self.sigmas, self.states, self.velocities))
        )


@torch.no_grad()
def walk(
    velocity: Velocity, numbers: tuple[int, ...], height: int, width: int, seed: int, device, steps: int = 8
) -> Paths:
    """Paths of these prompts by Euler's method, as sampled at 8 steps, one after the other. height, width: of the latent."""
    grid = flow.turbo_sigmas()[: steps + 1]
    states, velocities = torch.empty(2, len(numbers), steps, 16, height, width)
    for row, number in enumerate(numbers):
        x = torch.randn(1, 16, height, width, generator=flow.generator(seed, "health", number)).to(device)
        for place, (high, low) in enumerate(zip(grid, grid[1:])):
            v = velocity(x, high[None].to(device), (number,)).float()
            states[row, place], velocities[row, place] = x[0], v[0]
            x = x + v * (low - high)
    return Paths(numbers, grid[:-1].expand(len(numbers), -1), states, velocities)


@torch.no_grad()
def velocities(paths: Paths, velocity: Velocity, device) -> torch.Tensor:
    """[P, S, 16, h, w] fp32 on the CPU: another model's velocities at the states of these paths."""
    found = torch.empty_like(paths.velocities)
    for row, number in enumerate(paths.numbers):
        for place, (sigma, x) in enumerate(zip(paths.sigmas[row], paths.states[row])):
            found[row, place] = velocity(x[None].to(device), sigma[None].to(device), (number,))[0]
    return found


def deviations(paths: Paths, velocity: Velocity, device) -> torch.Tensor:
    """[P, S]: how far the velocity is from clean turbo's at each state, relative to that one's length: ‖v - v₀‖ / ‖v₀‖."""
    changed = velocities(paths, velocity, device) - paths.velocities
    return changed.flatten(2).norm(dim=2) / paths.velocities.flatten(2).norm(dim=2)


def high(deviations: torch.Tensor) -> float:
    """Of deviations [P, S >= HIGH] the mean of those that the gauge looks at."""
    rows = torch.arange(len(deviations))
    return deviations[rows, rows % HIGH].mean().item()


def gauge(deviation: float) -> float:
    """0: turbo untouched; 1: broken. Of the mean deviation at the gauge's states, as the share of unrelated pictures that it makes go wrong."""
    return 1 - math.exp(-((deviation / WORN) ** STEEPNESS))


def sharpness(images: torch.Tensor) -> float:
    """Mean square of the Laplacian of images [B, H, W, 3] in 0..1: what blur takes away first."""
    middle = images[:, 1:-1, 1:-1]
    around = images[:, :-2, 1:-1] + images[:, 2:, 1:-1] + images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return (4 * middle - around).square().mean().item()


def guarded(paths: Paths, *counters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(states, sigmas, clean velocities, prompt numbers) of GUARDED states, evenly over the noise levels; a function of the counters."""
    random, states = flow.generator("guard", *counters), paths.sigmas.shape[1]
    places = (torch.randint(states, (), generator=random) + torch.arange(GUARDED) * states // GUARDED) % states
    rows = torch.randint(len(paths.numbers), (GUARDED,), generator=random)
    return (
        paths.states[rows, places],
        paths.sigmas[rows, places],
        paths.velocities[rows, places],
        tuple(paths.numbers[row] for row in rows.tolist()),
    )
