"""Which pictures a step sees, in which shape, order and wording: functions of (seed, index) alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from . import flow
from .cache import Lazy
from .captions import Captions
from .dataset import Dataset, Encoded
from .recipe import Recipe
from .roles import Host, Progress, quiet

MASKS = 1000  # of the newest that stay in memory


@dataclass(frozen=True)
class Batches:
    """Which pictures share a batch. Every epoch goes once through the groups; a batch is of one shape.

    groups: numbers of the pictures that may share a batch, each as often as it is shown in an epoch.
    """

    groups: tuple[tuple[int, ...], ...]
    size: int
    seed: int

    @cached_property
    def firsts(self) -> np.ndarray:
        """[groups + 1] number of the first batch of each group, before they are mixed, and how many there are."""
        return np.cumsum([0, *(math.ceil(len(group) / self.size) for group in self.groups)])

    @property
    def per_epoch(self) -> int:
        return int(self.firsts[-1])

    def note(self) -> str:
        """A sentence where shapes keep batches from being full, or nothing."""
        short = sum(len(group) % self.size > 0 for group in self.groups)
        if not short or self.per_epoch == 1:
            return ""
        return (
            f"{short} of {self.per_epoch} batches an epoch have fewer than {self.size} pictures: only pictures of one "
            "shape share a batch. Crop the pictures to fewer shapes for full ones."
        )

    def at(self, index: int) -> tuple[int, ...]:
        """Picture numbers of batch `index`, counted from 0 over the whole run."""
        epoch, place = divmod(index, self.per_epoch)
        groups, mixed = self._order(epoch)
        number = mixed[place]
        group = np.searchsorted(self.firsts, number, side="right") - 1
        start = (number - self.firsts[group]) * self.size
        return tuple(groups[group][start : start + self.size].tolist())

    @cached_property
    def _order(self) -> Callable[[int], tuple[list[np.ndarray], np.ndarray]]:
        """Of an epoch: the pictures of each group, mixed, and the order of all batches. The newest is remembered."""
        groups = [np.array(group, np.int32) for group in self.groups]

        def of(epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
            random = flow.generator(self.seed, "order", epoch)
            mixed = [group[torch.randperm(len(group), generator=random).numpy()] for group in groups]
            return mixed, torch.randperm(self.per_epoch, generator=random).numpy()

        return lru_cache(1)(of)


@dataclass(frozen=True)
class Batch:
    """x0: latents [B, C, h, w]; captions: their numbers; weight: [B] on the loss.

    mask: [B, 1, h, w] of mean 1, or None where no picture has one.
    """

    x0: torch.Tensor
    captions: tuple[int, ...]
    weight: torch.Tensor
    mask: torch.Tensor | None

    def rows(self, rows: slice, device) -> "Batch":
        """A micro-batch of it, on the device."""
        mask = None if self.mask is None else self.mask[rows].to(device)
        return Batch(self.x0[rows].to(device), self.captions[rows], self.weight[rows].to(device), mask)


@dataclass(frozen=True)
class Pictures:
    """What batches are made of. Sequences have an entry a picture.

    masks: [V, 1, h, w] of mean 1, or None; dropout: chance that its caption is dropped; weight: on its loss.
    held_out: numbers of those that are only looked at; trained: of those that they are compared with.
    """

    encoded: Encoded
    captions: Captions
    batches: Batches
    masks: Sequence[torch.Tensor | None]
    dropout: list[float]
    weight: list[float]
    held_out: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()

    @property
    def shortest(self) -> int:
        """The shortest side of a latent."""
        return min(side for shape in set(self.encoded.shapes) for side in shape[2:])

    def at(self, seed: int, index: int) -> Batch:
        """Batch `index`: which pictures, which mirrored, in which tag order, whose captions are dropped."""
        numbers = self.batches.at(index)
        random = flow.generator(seed, "look", index)
        views = [int(torch.randint(self.encoded.shapes[n][0], (), generator=random)) for n in numbers]
        captions = tuple(self._caption(n, random) for n in numbers)
        x0 = torch.stack([self.encoded.latents[n][view] for n, view in zip(numbers, views)])
        weight = torch.tensor([self.weight[n] for n in numbers])
        masks = [None if (mask := self.masks[n]) is None else mask[view] for n, view in zip(numbers, views)]
        if all(mask is None for mask in masks):
            return Batch(x0, captions, weight, None)
        plain = torch.ones_like(x0[0, :1])
        return Batch(x0, captions, weight, torch.stack([plain if mask is None else mask for mask in masks]))

    def _caption(self, number: int, random: torch.Generator) -> int:
        dropped = torch.rand((), generator=random).item() < self.dropout[number]
        variants = self.captions.of[number]
        text = variants[int(torch.randint(len(variants), (), generator=random))]
        return self.captions.dropped if dropped and self.captions.dropped is not None else text

    def one(self, number: int) -> Batch:
        """Picture `number` as it is, with its own caption, unmasked."""
        return Batch(self.encoded.latents[number][:1], self.captions.of[number][:1], torch.ones(1), None)


def pictures_of(recipe: Recipe, dataset: Dataset, host: Host, progress: Progress = quiet) -> Pictures:
    """Everything that batches are made of, encoded by the host. progress: see `Host.encode`."""
    captions = dataset.captions()
    encoded = host.encode(dataset, captions, progress)
    items, held_out = dataset.items, dataset.held_out()

    @lru_cache(MASKS)
    def mask_of(number: int) -> torch.Tensor | None:
        mask = items[number].mask(recipe.data.outside, host.family.reduction)
        return None if mask is None else views_of(mask, encoded.shapes[number][0])

    repeats = [0 if n in held_out else item.repeats for n, item in enumerate(items)]
    return Pictures(
        encoded,
        captions,
        Batches(group_pictures(encoded, repeats), recipe.batch_size, recipe.seed),
        Lazy(len(items), mask_of),
        [dataset.dropout(n) for n in range(len(items))],
        [recipe.data.regularisation_weight if item.regularisation else 1.0 for item in items],
        tuple(sorted(held_out)),
        tuple(n for n, item in enumerate(items) if n not in held_out and not item.regularisation),
    )


def views_of(mask: torch.Tensor, views: int) -> torch.Tensor:
    """[V, 1, h, w]: the mask as it is and, where there is a second view, mirrored."""
    return torch.stack([mask, mask.flip(-1)][:views])


def group_pictures(encoded: Encoded, repeats: list[int]) -> tuple[tuple[int, ...], ...]:
    """Pictures of the same latent shape together. A picture stands there as often as it is shown in an epoch."""
    groups: dict[tuple, list[int]] = {}
    for number, shape in enumerate(encoded.shapes):
        groups.setdefault(shape[1:], []).extend([number] * repeats[number])
    return tuple(tuple(groups[key]) for key in sorted(groups) if groups[key])


def spread(numbers: tuple[int, ...], most: int) -> tuple[int, ...]:
    """At most so many of them, evenly from first to last."""
    return numbers if len(numbers) <= most else tuple(numbers[i * len(numbers) // most] for i in range(most))
