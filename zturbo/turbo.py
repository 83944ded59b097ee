"""Turbo watched and kept while a LoRA trains: the gauge's readings, and the guard's gradients. Maths in `health`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import health
from .health import Paths
from .recipe import Recipe

LARGEST = 64  # side of a latent: 512 pixels
Velocity = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...], float], torch.Tensor]


@dataclass(frozen=True)
class Watch:
    """Clean turbo's own paths of the unrelated prompts: for the gauge, for the guard; None where there is none.

    de_distilled: the guard's paths with the velocities of the model that trains, adapter and all; first: the host's number of the first prompt.
    """

    gauge: Paths | None = None
    guard: Paths | None = None
    de_distilled: Paths | None = None
    first: int = 0

    def of(self, velocity: Velocity, factor: float = 0.0) -> health.Velocity:
        """The velocity with this much of the adapter, for the unrelated prompts by their numbers."""
        return lambda x, sigma, numbers: velocity(x, sigma, tuple(self.first + n for n in numbers), factor)

    def read(self, velocity: Velocity, step: int, device, together: int) -> dict:
        """A reading of the gauge, as an event."""
        assert self.gauge is not None
        deviation = health.deviations(self.gauge, self.of(velocity), device, together).mean().item()
        return {"event": "health", "step": step, "gauge": round(health.gauge(deviation), 4), "deviation": round(deviation, 5)}

    def hold(self, recipe: Recipe, step: int, velocity: Velocity, device, pieces: Callable[[int], list[slice]]) -> float:
        """Gradients that hold the model with the LoRA to its own velocities without, at states of turbo's paths. Returns their mean square difference.

        Takes turns: without the adapter, as turbo will be used, and with it, as the LoRA trains. Held without it alone,
        a LoRA learns that the adapter is what tells the two apart, instead of the prompt.
        """
        bare = self.de_distilled is None or step // recipe.turbo.interval % 2 == 0
        paths, with_lora = (self.guard, self.of(velocity)) if bare else (self.de_distilled, self.of(velocity, 1.0))
        assert paths is not None
        states, sigmas, clean, numbers = health.guarded(paths, recipe.seed, step)
        total = torch.zeros((), device=device)
        for rows in pieces(len(numbers)):
            v = with_lora(states[rows].to(device), sigmas[rows].to(device), numbers[rows])
            loss = (v.float() - clean[rows].to(device)).square().mean(dim=(1, 2, 3)).sum() / len(numbers)
            (recipe.turbo.weight * loss).backward()
            total += loss.detach()
        return total.item()


def watch(recipe: Recipe, first: int, short: int, velocity: Velocity, device, together: int, adapter: bool = True) -> Watch:
    """Let clean turbo (the velocity without adapter and LoRA) walk the paths that the recipe needs.

    first: the host's number of the first unrelated prompt; short: the shortest side of the trained latents; together: prompts
    that go through the model at once; adapter: does the model carry one?
    """
    wish = recipe.turbo
    side = wish.size // 8 or min(LARGEST, short)
    numbers, plain = tuple(range(len(wish.prompts))), Watch(first=first)
    gauge = health.walk(plain.of(velocity), numbers[: health.WATCHED], side, side, recipe.seed, device, together, health.HIGH) if wish.every else None
    if not wish.guarded:
        return replace(plain, gauge=gauge)
    guard = health.walk(plain.of(velocity), numbers[health.WATCHED :], side, side, recipe.seed, device, together)
    other = replace(guard, velocities=health.velocities(guard, plain.of(velocity, 1.0), device, together)) if adapter else None
    return Watch(gauge, guard, other, first)
