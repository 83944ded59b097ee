"""How turbo a model with a LoRA still is, and the guard that keeps it so.

Clean turbo walks its own 8-step path for prompts that have nothing to do with what is trained. At the states of
that path the velocities of turbo with the LoRA are compared with its own: what a LoRA changes there, it changes in
pictures that nobody asked it to change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import flow

PROMPTS = (
    "a photo of a red bicycle leaning against a brick wall",
    "an oil painting of a stormy sea with a small sailing boat",
    "a close-up of a bowl of fresh strawberries on a wooden table",
    "a snowy mountain village at night, lights in the windows",
    "a black and white photo of an old man reading a newspaper",
    "a sign that says OPEN in a shop window",
    "a watercolor of a fox in an autumn forest",
    "an astronaut walking through a field of sunflowers",
    "a modern kitchen with a large window, morning light",
    "a portrait of a woman with curly hair and a green scarf",
    "a busy market street in the rain, people with umbrellas",
    "a glass of water on a marble counter, studio lighting",
    "a cartoon robot watering plants on a balcony",
    "an aerial view of a river delta at sunset",
    "a wooden chair in an empty white room",
    "a cat asleep on a pile of books",
)
GUARDED = 4  # states that a guarded step looks at
Velocity = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Paths:
    """Clean turbo's 8-step paths of P prompts. sigmas: [8]; states and velocities: [P, 8, 16, h, w] on the CPU, in fp32."""

    sigmas: torch.Tensor
    states: torch.Tensor
    velocities: torch.Tensor

    @property
    def prompts(self) -> int:
        return len(self.states)


@torch.no_grad()
def walk(velocity: Velocity, prompts: int, height: int, width: int, seed: int, device, together: int = 4) -> Paths:
    """Paths of prompts 0 … prompts - 1 by Euler's method, as sampled at 8 steps. height, width: of the latent; together: prompts that go through the model at once."""
    grid = flow.turbo_sigmas()
    states, velocities = [], []
    for first in range(0, prompts, together):
        numbers = tuple(range(first, min(first + together, prompts)))
        x = torch.stack([torch.randn(16, height, width, generator=flow.generator(seed, "health", n)) for n in numbers]).to(device)
        seen, moved = [], []
        for high, low in zip(grid, grid[1:]):
            v = velocity(x, torch.full((len(numbers),), float(high), device=device), numbers).float()
            seen.append(x.cpu())
            moved.append(v.cpu())
            x = x + v * (low - high)
        states.append(torch.stack(seen, 1))
        velocities.append(torch.stack(moved, 1))
    return Paths(grid[:-1], torch.cat(states), torch.cat(velocities))


@torch.no_grad()
def deviations(paths: Paths, velocity: Velocity, device, together: int = 4) -> torch.Tensor:
    """[P, 8]: relative distance of the velocity from clean turbo's at each state, ‖v - v₀‖ / ‖v₀‖."""
    found = torch.zeros(paths.prompts, len(paths.sigmas))
    for place, sigma in enumerate(paths.sigmas):
        for first in range(0, paths.prompts, together):
            rows = range(first, min(first + together, paths.prompts))
            x, clean = paths.states[rows.start : rows.stop, place], paths.velocities[rows.start : rows.stop, place]
            v = velocity(x.to(device), torch.full((len(rows),), float(sigma), device=device), tuple(rows)).float().cpu()
            found[rows.start : rows.stop, place] = (v - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    return found


def guarded(paths: Paths, *counters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """(states, sigmas, clean velocities, prompt numbers) of GUARDED states, evenly over the noise levels; a function of the counters."""
    random = flow.generator("guard", *counters)
    places = (torch.randint(len(paths.sigmas), (), generator=random) + torch.arange(GUARDED) * len(paths.sigmas) // GUARDED) % len(paths.sigmas)
    numbers = torch.randint(paths.prompts, (GUARDED,), generator=random)
    return paths.states[numbers, places], paths.sigmas[places], paths.velocities[numbers, places], tuple(numbers.tolist())
