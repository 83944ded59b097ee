"""The two parties that the trainer talks to: the host that runs the model, and the person at the screen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .captions import Captions
from .dataset import Dataset, Encoded
from .family import Family
from .lowrank import Difference, Target

Lora = dict[str, Difference]
Progress = Callable[[int, int], None]  # (done, total) of what takes long; raises when the run is cancelled
# (x_t [B, C, h, w], sigma [B], numbers of the captions, factor on the adapter's strength) -> velocity [B, C, h, w] fp32
Velocity = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...], float], torch.Tensor]


def quiet(done: int, total: int):
    """A `Progress` that nobody watches."""


def counter(progress: Progress, total: int) -> Callable[[], None]:
    """To be called before each of `total` things: `progress` then says how far this is."""
    done = 0

    def next_one():
        nonlocal done
        progress(done, total)
        done += 1

    return next_one


def watched(items: Sequence, progress: Progress) -> Iterator:
    """The items; before each `progress` says how far this is."""
    for number, item in enumerate(items):
        progress(number, len(items))
        yield item


class Host(Protocol):
    """What the trainer trains in: a model with its text encoder and autoencoder, and a way to draw.

    A new host brings these members, and those of `runs.Host` where whole runs are conducted with it. The folder hosts/
    has those that there are; cli/hosts.py picks one for the command line. Texts are numbers to the trainer: the host
    encodes captions first and the texts of `turbo.texts` behind, and the velocity takes their numbers in that order.
    """

    family: Family
    device: torch.device
    targets: list[Target]  # the trainable modules
    turbo: bool  # Is the model that trains turbo itself, once its adapter is taken away?
    at_once: int | None  # pictures that go through the model together; 0: all of a batch; None: it is not decided yet

    def encode(self, dataset: Dataset, captions: Captions, progress: Progress) -> Encoded:
        """Latents of the pictures. The host keeps the captions' features, and behind them those of `turbo.texts`.

        progress: said before each text and each picture.
        """
        ...

    def start(self) -> Lora | None:
        """The LoRA that the recipe starts from, where it names one."""
        ...

    def norms(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """[1, in] column norms of the clean weights by part, for DoRA."""
        ...

    def training(self, lora: Lora) -> AbstractContextManager[Velocity]:
        """While open, the model is loaded with the adapter and `lora`. Afterwards the weights are clean, to the bit.

        The velocity's last argument is a factor on the adapter's strength: 1 trains, 0 is the model without adapter.
        """
        ...

    def out_of_memory(self, error: Exception) -> bool:
        """Is this error a device whose memory ran out?"""
        ...

    @property
    def frugal(self) -> bool:
        """Is there nothing left to give up for memory?"""
        ...

    def save_memory(self) -> str:
        """Give something up for memory, whatever the recipe says, and say what.

        First what is kept for the backward (gradient checkpointing), then half of the pictures that go through at once.
        """
        ...

    def told(self) -> list[str]:
        """Sentences on how it computes, for the person at the screen: those that were not given out yet."""
        ...

    def memory(self) -> dict[str, float]:
        """GB in use where the model runs, as fields of a step's event (see `hosts.devices.memory_facts`)."""
        ...

    def draw(self, state: dict[str, torch.Tensor], progress: Progress) -> list[np.ndarray]:
        """Previews [H, W, 3] uint8 of the LoRA in `state`, on the clean turbo model; one a prompt.

        progress: said before each prompt.
        """
        ...


class Control(Protocol):
    """The person at the screen."""

    @property
    def stop_requested(self) -> bool: ...

    def check(self) -> None:
        """Raises when the run was cancelled."""
        ...

    def phase(self, name: str, done: int, total: int) -> None:
        """What the run does now, usually one of `PHASES`, and how far it is. total 0: nobody knows."""
        ...

    def step(self, event: dict) -> None: ...

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]) -> None: ...

    def look(self, event: dict) -> None:
        """A validation, or a reading of the gauge."""
        ...

    def say(self, sentence: str) -> None:
        """Something that the person should know; training goes on."""
        ...


# What a run says that it does. Training and restoring are its phases (see `phases`), the others lie around those
PHASES = ("encoding", "walking", "validating", "training", "restoring", "drawing", "saving")
PAUSED = "paused"  # in the middle of any of them


class Unattended:
    """A `Control` with nobody at the screen."""

    stop_requested = False

    def check(self): ...

    def phase(self, name: str, done: int, total: int): ...

    def step(self, event: dict): ...

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]): ...

    def look(self, event: dict): ...

    def say(self, sentence: str): ...
