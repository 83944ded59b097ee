"""Turbo watched and kept while a LoRA trains: the gauge's readings, and the guard's gradients. Maths in `health`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import health
from .health import Paths
from .recipe import Recipe

LARGEST = 64  # side of a latent: 512 pixels
Velocity = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...], float], torch.Tensor]


@dataclass(frozen=True)
class Watch:
    """Clean turbo's own paths of the unrelated prompts: for the gauge, for the guard; None where there is none. first: the host's number of the first prompt."""

    gauge: Paths | None = None
    guard: Paths | None = None
    first: int = 0

    def clean(self, velocity: Velocity) -> health.Velocity:
        """The velocity without the adapter, for the unrelated prompts by their numbers."""
        return lambda x, sigma, numbers: velocity(x, sigma, tuple(self.first + n for n in numbers), 0.0)

    def read(self, velocity: Velocity, step: int, device, together: int) -> dict:
        """A reading of the gauge, as an event."""
        assert self.gauge is not None
        deviation = health.deviations(self.gauge, self.clean(velocity), device, together).mean().item()
        return {"event": "health", "step": step, "gauge": round(health.gauge(deviation), 4), "deviation": round(deviation, 5)}

    def hold(self, recipe: Recipe, step: int, velocity: Velocity, device, pieces: Callable[[int], list[slice]]) -> float:
        """Gradients that hold turbo with the LoRA to clean turbo's velocities, at states of its own paths. Returns their mean square difference."""
        assert self.guard is not None
        states, sigmas, clean, numbers = health.guarded(self.guard, recipe.seed, step)
        total, bare = torch.zeros((), device=device), self.clean(velocity)
        for rows in pieces(len(numbers)):
            v = bare(states[rows].to(device), sigmas[rows].to(device), numbers[rows])
            loss = (v.float() - clean[rows].to(device)).square().mean(dim=(1, 2, 3)).sum() / len(numbers)
            (recipe.turbo.weight * loss).backward()
            total += loss.detach()
        return total.item()


def watch(recipe: Recipe, first: int, short: int, velocity: Velocity, device, together: int) -> Watch:
    """Let clean turbo (the velocity without adapter and LoRA) walk the paths that the recipe needs.

    first: the host's number of the first unrelated prompt; short: the shortest side of the trained latents; together: prompts that go through the model at once.
    """
    wish = recipe.turbo
    side = wish.size // 8 or min(LARGEST, short)
    numbers, bare = tuple(range(len(wish.prompts))), Watch(first=first).clean(velocity)
    gauge = health.walk(bare, numbers[: health.WATCHED], side, side, recipe.seed, device, together, health.HIGH) if wish.every else None
    guard = health.walk(bare, numbers[health.WATCHED :], side, side, recipe.seed, device, together) if wish.guarded else None
    return Watch(gauge, guard, first)
