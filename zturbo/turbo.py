"""Turbo watched and kept while a LoRA trains: reference trajectories for the gauge, the guard and restoring.

The gauge reads how much of turbo a LoRA has spoilt for prompts that have nothing to do with its pictures. The guard is
a penalty on that while the pictures are learnt. Restoring is a phase behind it, which brings turbo back. All three
compare velocities at states of trajectories that turbo itself has walked, from noise to picture in 8 steps.

The maths is in `health`, what is made small in `objectives`, when it happens in `phases` and `hooks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import health, words
from .errors import ZTurboError
from .health import Trajectories
from .recipe import Recipe
from .roles import Host, Velocity

LARGEST = 512  # pixels, of the pictures in which turbo is watched


@dataclass(frozen=True)
class References:
    """Trajectories of the unrelated prompts, by the host's numbers; None where there is no use for them.

    gauge: one state a prompt of clean turbo's trajectories, with its velocities.
    guard: all states of clean turbo's trajectories. Their velocities are those of the model that trains, with the
    adapter on and without the LoRA. Were they clean turbo's, the LoRA would learn to tell by the adapter, and not by
    the prompt, when it is wanted; without the adapter it would be weak. Where the model that trains is no turbo, the
    trajectories are its own.
    """

    gauge: Trajectories | None = None
    guard: Trajectories | None = None

    def read(self, velocity: Velocity, step: int, device) -> dict:
        """A reading of the gauge, as an event."""
        assert self.gauge is not None
        deviation = health.deviations(self.gauge, with_adapter_at(0.0, velocity), device).mean().item()
        reading = round(health.gauge(deviation), 4)
        return {"event": "health", "step": step, "gauge": reading, "deviation": round(deviation, 5)}


def with_adapter_at(factor: float, velocity: Velocity, first: int = 0) -> health.VelocityOfPrompts:
    """The velocity at a factor on the adapter's strength, 0: without the adapter.

    Its prompts are numbered from 0; the first of them is the host's number `first`.
    """
    return lambda x, sigma, numbers: velocity(x, sigma, tuple(first + number for number in numbers), factor)


def telling(velocity: Velocity, told: Callable[[], None]) -> Velocity:
    """The velocity. Before each of its calls `told` is called (see `roles.counter`)."""

    def called(*given):
        told()
        return velocity(*given)

    return called


def references(recipe: Recipe, host: Host, first: int, short: int, velocity: Velocity) -> References:
    """Walk the trajectories that the recipe needs. velocity: without the LoRA.

    first: the host's number of the first unrelated prompt. short: the shortest side of the pictures' latents.
    """
    wish, family = recipe.turbo, host.family
    size = (side(recipe, host, short),) * 2
    numbers = tuple(range(len(wish.prompts)))
    clean = with_adapter_at(0.0 if host.turbo else 1.0, velocity, first)
    gauge = guard = None
    if wish.every and host.turbo:
        watched = numbers[: health.WATCHED]
        gauge = health.walk(family, clean, watched, size, recipe.seed, host.device, health.HIGH).one_each()
    if wish.guarded:
        guard = health.walk(family, clean, numbers[health.WATCHED :], size, recipe.seed, host.device)
        trained = health.velocities(guard, with_adapter_at(1.0, velocity, first), host.device)
        guard = replace(guard, velocities=trained)
    return References(*(one and one.numbered_from(first) for one in (gauge, guard)))


def forwards(recipe: Recipe, host: Host) -> int:
    """How many forward passes `references` takes. 0: the recipe asks for none, or for none that can be had."""
    watched = min(health.WATCHED, len(recipe.turbo.prompts))
    gauge = watched * health.HIGH if recipe.turbo.every and host.turbo else 0
    guard = 2 * (len(recipe.turbo.prompts) - watched) * host.family.steps if recipe.turbo.guarded else 0
    return gauge + guard


def side(recipe: Recipe, host: Host, short: int) -> int:
    """Of the latents in which turbo is watched. short: the shortest side of the pictures'."""
    reduction = host.family.reduction
    return recipe.turbo.size // reduction or min(LARGEST // reduction, short)


def texts(recipe: Recipe, trigger: str, is_turbo: bool) -> tuple[str, ...]:
    """What a host encodes behind the captions: the unrelated prompts, and then those that name what is trained.

    As far as they are needed.
    """
    wish = recipe.turbo
    if wish.restores:
        prefixed = tuple(f"{trigger}, {prompt}" for prompt in wish.prompts[health.WATCHED :]) if trigger else ()
        return wish.prompts + (wish.restore_prompts or prefixed)
    if wish.guarded:
        return wish.prompts
    return wish.prompts[: health.WATCHED] if wish.every and is_turbo else ()


def refuse(recipe: Recipe, is_turbo: bool):
    """Raise ZTurboError for what of a recipe needs a turbo model to train on, where there is none."""
    wish = recipe.turbo
    if is_turbo or not (wish.restores or wish.stop_above):
        return
    named = f"keep_turbo is {wish.keep}" if wish.restores else f"stop_above is {wish.stop_above:g}"
    raise ZTurboError(
        f"{named}, but the model that trains is not turbo: previews are drawn with another one (preview_model). "
        "Set keep_turbo to off or guard, and stop_above to 0."
    )


def doubts(recipe: Recipe, trigger: str) -> list[str]:
    """What about restoring is probably not meant."""
    wish = recipe.turbo
    if not wish.restores:
        return []
    if not trigger:
        return [] if wish.restore_prompts else [NO_TRIGGER]
    named = [prompt for prompt in wish.prompts[health.WATCHED :] if words.has_word(prompt, trigger)]
    nameless = [prompt for prompt in wish.restore_prompts if not words.has_word(prompt, trigger)]
    found = []
    if named:
        found.append(
            f"{len(named)} of the unrelated prompts have the trigger word {trigger} in them, "
            f"which restoring unlearns there (for example: {named[0]})."
        )
    if nameless:
        found.append(
            f"{len(nameless)} of restore_prompts have no trigger word {trigger} in them (for example: {nameless[0]})."
        )
    return found


NO_TRIGGER = (
    "keep_turbo is restore, and there is no trigger word: restoring can hold what is learnt in your own captions only. "
    "Set a trigger word, or write restore_prompts."
)
