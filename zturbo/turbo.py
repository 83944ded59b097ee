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
    """Paths of the unrelated prompts, None where there is none. first: the host's number of the first prompt.

    gauge: clean turbo's own, with its velocities. guard: clean turbo's own too (those of the model that trains, where that is no turbo), with the
    velocities of the model that trains, adapter and all.
    """

    gauge: Paths | None = None
    guard: Paths | None = None
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
        """Gradients that hold the model with the LoRA to its own velocities without, at states of the paths. Returns their mean square difference.

        With the adapter on, as the rest of the training is: held without it, a LoRA learns that the adapter tells its own
        pictures from the others, instead of the prompt, and is weak where the adapter is off.
        """
        assert self.guard is not None
        states, sigmas, own, numbers = health.guarded(self.guard, recipe.seed, step)
        total, with_lora = torch.zeros((), device=device), self.of(velocity, 1.0)
        for rows in pieces(len(numbers)):
            v = with_lora(states[rows].to(device), sigmas[rows].to(device), numbers[rows])
            loss = (v.float() - own[rows].to(device)).square().mean(dim=(1, 2, 3)).sum() / len(numbers)
            (recipe.turbo.weight * loss).backward()
            total += loss.detach()
        return total.item()


def watch(recipe: Recipe, first: int, short: int, is_turbo: bool, velocity: Velocity, device, together: int) -> Watch:
    """Walk the paths that the recipe needs. velocity: without the LoRA.

    first: the host's number of the first unrelated prompt; short: the shortest side of the trained latents; is_turbo: does
    the model that trains become turbo when its adapter is taken away? together: prompts that go through the model at once.
    """
    wish = recipe.turbo
    side = wish.size // 8 or min(LARGEST, short)
    numbers, plain = tuple(range(len(wish.prompts))), Watch(first=first)
    bare, trained = plain.of(velocity, 0.0 if is_turbo else 1.0), plain.of(velocity, 1.0)
    gauge = guard = None
    if wish.every and is_turbo:
        gauge = health.walk(bare, numbers[: health.WATCHED], side, side, recipe.seed, device, together, health.HIGH).one_each()
    if wish.guarded:
        paths = health.walk(bare, numbers[health.WATCHED :], side, side, recipe.seed, device, together)
        guard = replace(paths, velocities=health.velocities(paths, trained, device, together))
    return Watch(gauge, guard, first)
