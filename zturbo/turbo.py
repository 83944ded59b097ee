"""Turbo watched and kept while a LoRA trains: the gauge's readings, the guard's gradients, and the last steps that restore turbo. Maths in `health`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from . import health, words
from .health import Paths
from .recipe import Recipe

# of what restoring makes small: what is trained stays more of itself than at a half, and as much of turbo comes back (tried on the tiny turbo)
NAMED = 0.75
LARGEST = 64  # side of a latent: 512 pixels
Pieces = Callable[[int], list[slice]]  # what of so many states goes through the model at once
Losses = Iterator[tuple[torch.Tensor, torch.Tensor]]
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

    def read(self, velocity: Velocity, step: int, device) -> dict:
        """A reading of the gauge, as an event."""
        assert self.gauge is not None
        deviation = health.deviations(self.gauge, self.of(velocity), device).mean().item()
        return {
            "event": "health",
            "step": step,
            "gauge": round(health.gauge(deviation), 4),
            "deviation": round(deviation, 5),
        }

    def hold(self, recipe: Recipe, step: int, velocity: Velocity, device, pieces: Pieces) -> float:
        """Gradients that hold the model with the LoRA to its own velocities without, at states of the paths. Returns their mean square difference.

        With the adapter on, as the rest of the training is: held without it, a LoRA learns that the adapter tells its own
        pictures from the others, instead of the prompt, and is weak where the adapter is off.
        """
        assert self.guard is not None
        total = torch.zeros((), device=device)
        for loss, _ in held(self.guard, (recipe.seed, step), self.of(velocity, 1.0), device, pieces):
            (recipe.turbo.weight * loss).backward()
            total += loss.detach()
        return total.item()


@dataclass(frozen=True)
class Restore:
    """What the last steps of a run teach, without the adapter: to be the LoRA as it was taught where a prompt names it, and clean turbo where none does.

    named: walked by turbo with that LoRA, for captions and prompts that name it; clean: by clean turbo, for the unrelated prompts.
    """

    named: Paths
    clean: Paths

    def losses(self, recipe: Recipe, place: int, velocity: Velocity, device, pieces: Pieces) -> Losses:
        """As the trainer's own: loss and sigmas of each piece of batch `place`; the losses add up to the batch's mean square difference, in which the named prompts count as NAMED."""
        for kind, paths, share in (("named", self.named, NAMED), ("clean", self.clean, 1 - NAMED)):
            for loss, sigmas in held(
                paths,
                (recipe.seed, place, kind),
                lambda x, sigma, numbers: velocity(x, sigma, numbers, 0.0),
                device,
                pieces,
            ):
                yield share * loss, sigmas


def held(paths: Paths, counters: tuple, velocity: health.Velocity, device, pieces: Pieces) -> Losses:
    """Mean square difference from the paths' velocities at some states of theirs, a function of the counters, in pieces; and their sigmas."""
    states, sigmas, own, numbers = health.guarded(paths, *counters)
    for rows in pieces(len(numbers)):
        v = velocity(states[rows].to(device), sigmas[rows].to(device), numbers[rows])
        yield (v.float() - own[rows].to(device)).square().mean(dim=(1, 2, 3)).sum() / len(numbers), sigmas[rows]


def texts(recipe: Recipe, trigger: str, is_turbo: bool) -> tuple[str, ...]:
    """What a host encodes behind the captions: the unrelated prompts, and then those that name what is trained, as far as they are needed."""
    wish = recipe.turbo
    if wish.restores:
        prefixed = tuple(f"{trigger}, {prompt}" for prompt in wish.prompts[health.WATCHED :]) if trigger else ()
        return wish.prompts + (wish.restore_prompts or prefixed)
    return wish.prompts if wish.guarded else wish.prompts[: health.WATCHED] if wish.every and is_turbo else ()


def doubts(recipe: Recipe, trigger: str) -> list[str]:
    """What about restoring is probably not meant."""
    wish = recipe.turbo
    if not wish.restores:
        return []
    if not trigger:
        return (
            []
            if wish.restore_prompts
            else [
                "keep_turbo is restore, and there is no trigger word: restoring can hold what is learnt in your own captions only. Set a trigger word, or write restore_prompts."
            ]
        )
    named = [prompt for prompt in wish.prompts[health.WATCHED :] if words.has_word(prompt, trigger)]
    nameless = [prompt for prompt in wish.restore_prompts if not words.has_word(prompt, trigger)]
    found = (
        [
            f"{len(named)} of the unrelated prompts have the trigger word {trigger} in them, which restoring unlearns there (for example: {named[0]})."
        ]
        if named
        else []
    )
    return found + (
        [f"{len(nameless)} of restore_prompts have no trigger word {trigger} in them (for example: {nameless[0]})."]
        if nameless
        else []
    )


def side(recipe: Recipe, short: int) -> int:
    """Of the latents in which turbo is watched. short: the shortest side of the trained ones."""
    return recipe.turbo.size // 8 or min(LARGEST, short)


def watch(recipe: Recipe, first: int, short: int, is_turbo: bool, velocity: Velocity, device) -> Watch:
    """Walk the paths that the recipe needs. velocity: without the LoRA.

    first: the host's number of the first unrelated prompt; short: the shortest side of the trained latents; is_turbo: does
    the model that trains become turbo when its adapter is taken away?
    """
    wish, width = recipe.turbo, side(recipe, short)
    numbers, plain = tuple(range(len(wish.prompts))), Watch(first=first)
    bare, trained = plain.of(velocity, 0.0 if is_turbo else 1.0), plain.of(velocity, 1.0)
    gauge = guard = None
    if wish.every and is_turbo:
        gauge = health.walk(bare, numbers[: health.WATCHED], width, width, recipe.seed, device, health.HIGH).one_each()
    if wish.guarded:
        paths = health.walk(bare, numbers[health.WATCHED :], width, width, recipe.seed, device)
        guard = replace(paths, velocities=health.velocities(paths, trained, device))
    return Watch(gauge, guard, first)
