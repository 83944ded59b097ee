"""What an optimizer step makes small. A phase of a run has one objective, and may have penalties beside it.

An objective draws what it needs from counters (seed, index), as the batches do; it touches no state, disk or screen.
Where to add what: another way to measure an error is in `flow.velocity_loss`; something more to make small beside the
pictures is an objective here and a `Penalty` in `phases.learning`; another thing to learn (preference pairs, on-policy
distillation) is an objective here and a phase of its own in `phases.plan`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from . import flow, health
from .batches import Batch, Pictures
from .health import Trajectories
from .recipe import Recipe
from .roles import Host, Velocity
from .world import ALONE, World

Loss = tuple[torch.Tensor, torch.Tensor]  # of a micro-batch: its share of the batch's mean loss, and its sigmas [b]


@dataclass(frozen=True)
class Split:
    """How a batch goes through the model. at_once: rows that go through together; None: all.

    world: the processes that share the batch, this one among them. turn: see `World.share`.
    """

    at_once: int | None = None
    world: World = ALONE
    turn: int = 0

    def rows(self, size: int) -> list[slice]:
        """The micro-batches of this process's share of a batch of this size. It may have none."""
        mine = self.world.share(size, self.turn)
        step = self.at_once or max(1, len(mine))
        return [slice(n, min(n + step, mine.stop)) for n in mine[::step]]


class Objective(Protocol):
    def losses(self, index: int, velocity: Velocity, split: Split) -> Iterator[Loss]:
        """Of each micro-batch of batch `index`, counted from 0 over the whole run.

        The losses add up to the batch's mean. The trainer calls backward on each before it asks for the next.
        """
        ...


@dataclass(frozen=True)
class FlowMatching:
    """The velocity at noised pictures is brought to eps - x0 (arXiv 2209.03003), with the adapter on."""

    recipe: Recipe
    pictures: Pictures
    host: Host

    def losses(self, index: int, velocity: Velocity, split: Split) -> Iterator[Loss]:
        recipe, device = self.recipe, self.host.device
        batch, options = self.pictures.at(recipe.seed, index), recipe.timesteps
        random = flow.generator(recipe.seed, "step", index)
        size, shift = len(batch.captions), self.host.family.shift
        sigma = flow.sample_sigma(options.density, size, random, shift, options.mean, options.std)
        sigma = options.min_sigma + (options.max_sigma - options.min_sigma) * sigma
        eps = torch.randn(batch.x0.shape, generator=random)
        adapter = adapter_factor(recipe, index // recipe.optimizer.accumulation)
        # before they go to the device, where it would wait for them
        weight = batch.weight * flow.loss_weight(options.density, sigma, recipe.loss.weighting)
        batch = replace(batch, weight=weight)
        for rows in split.rows(size):
            some = batch.rows(rows, device)
            each = picture_losses(recipe, some, eps[rows].to(device), sigma[rows].to(device), velocity, adapter)
            yield each.sum() / size, sigma[rows]


@dataclass(frozen=True)
class Anchors:
    """A set of reference trajectories and its share of an objective. name: of its counters; empty: they have none."""

    trajectories: Trajectories
    share: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class TrajectoryMatching:
    """The velocity at states of reference trajectories is brought to the trajectories' own.

    adapter: the factor on the adapter's strength while it is compared.
    """

    seed: int
    sets: tuple[Anchors, ...]
    adapter: float
    device: torch.device

    def losses(self, index: int, velocity: Velocity, split: Split) -> Iterator[Loss]:
        for one in self.sets:
            counters = (self.seed, index, one.name) if one.name else (self.seed, index)
            states, sigmas, own, numbers = health.anchors(one.trajectories, *counters)
            for rows in split.rows(len(numbers)):
                x, sigma, target = (tensor[rows].to(self.device) for tensor in (states, sigmas, own))
                v = velocity(x, sigma, numbers[rows], self.adapter)
                each = (v.float() - target).square().mean(dim=(1, 2, 3))
                yield one.share * (each.sum() / len(numbers)), sigmas[rows]


@dataclass(frozen=True)
class Penalty:
    """An objective beside the phase's own, every so many steps. Its gradients are those of weight * loss.

    Its index is the step. name: of its value in the log, which is the loss without the weight.
    """

    name: str
    objective: Objective
    weight: float
    every: int


def adapter_factor(recipe: Recipe, step: int) -> float:
    """How much of the adapter's strength there is at step `step` (from 0)."""
    course = min(1.0, step / max(1, recipe.learning_steps - 1))
    return recipe.adapter.start + (recipe.adapter.end - recipe.adapter.start) * course


def picture_losses(
    recipe: Recipe, batch: Batch, eps: torch.Tensor, sigma: torch.Tensor, velocity: Velocity, adapter: float
) -> torch.Tensor:
    """[b] losses of pictures that go through the model at once."""
    v = velocity(flow.add_noise(batch.x0, eps, sigma), sigma, batch.captions, adapter)
    target = flow.velocity_target(batch.x0, eps)
    if recipe.loss.guidance not in (0, 1):
        target = flow.guided_target(v, target, recipe.loss.guidance)
    delta = recipe.loss.huber_delta if recipe.loss.kind == "huber" else None
    return flow.velocity_loss(v, target, batch.weight, delta, batch.mask)
