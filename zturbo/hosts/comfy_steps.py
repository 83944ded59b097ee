"""Which way a step goes through NextDiT, and how much of it is kept for the backward.

The fast way (`comfy_blocks`) where the layers and the LoRA are what it knows, else the model's own modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from .. import keeping, lowrank, memory
from ..keeping import FP32, Keeping
from ..lowrank import Difference, Factors
from ..memory import GB
from . import comfy_adapter, comfy_blocks, comfy_forward, comfy_needs, devices

if TYPE_CHECKING:
    from .comfy import ComfyHost

log = logging.getLogger("zturbo")
UNLIKE = 1.05  # times what was planned: from then on the plan is made anew


class Steps:
    """The steps of a host. `begin` comes each time that the model is loaded."""

    def __init__(self, host: ComfyHost):
        self.host = host
        self.fast: comfy_blocks.Fast | None = None
        self.why_not = ""
        self.keeping: Keeping | None = None
        self.notes: list[str] = []
        self.error = 1.0  # what a step needed, as a multiple of the plan
        self.measuring: float | None = None  # bytes allocated before a step that is to be measured
        self.gradients = 0  # bytes
        self.again: Callable[[], None] = lambda: None

    def told(self) -> list[str]:
        """See `roles.Host.told`. A step is over: where the device counts, its peak is held against the plan."""
        self.measure()
        notes, self.notes = self.notes, []
        return notes

    def tell(self, sentence: str):
        self.notes.append(sentence)

    def room(self, lora: dict[str, Difference], tokens: int) -> int:
        """Bytes that the memory manager is asked to keep free beside the weights: the least that a step takes.

        Where layers are to be kept, all that they take.
        """
        plan = keeping.plan(comfy_needs.sizes_of(self.host, lora), tokens, 0, self.host.whole)
        return int(memory.total(comfy_needs.of_step(self.host, lowrank.count(lora), tokens, plan.bytes)))

    def begin(self, linears, lora: dict[str, Difference], tokens: int):
        """The model is loaded with these Linears."""
        host, self.fast = self.host, None
        self.why_not = self.why_not or comfy_blocks.usable(host.dit, lora)
        if self.why_not:
            log.info("Through the model's own modules: %s.", self.why_not)
            return
        like = torch.empty(0, device=host.device, dtype=host.dtype)
        self.fast = comfy_blocks.Fast(host.dit, linears, comfy_adapter.targets(host.dit), lora, like)
        self.plan(lora, tokens)

    def plan(self, lora: dict[str, Difference], tokens: int):
        """How much the blocks keep, out of what is free now."""
        host, numbers, before = self.host, lowrank.count(lora), self.keeping
        beside = memory.total(comfy_needs.of_step(host, numbers, tokens, 0.0))
        free = (comfy_needs.free(host) - beside) / self.error
        self.keeping = keeping.plan(comfy_needs.sizes_of(host, lora), tokens, free, host.whole)
        for block, keep in zip(self.fast.layers, self.keeping.blocks):
            block.keep = keep
        if before is None or before.blocks != self.keeping.blocks:
            self.tell(self.keeping.spelled())
            self.measuring = devices.begin_peak(host.device)
            self.again = lambda: self.plan(lora, tokens)
            self.gradients = FP32 * numbers

    def measure(self):
        """The first step of a plan is over."""
        if self.measuring is None or self.keeping is None:
            return
        needed = devices.peak(self.host.device) - self.measuring - self.gradients
        self.measuring = None
        self.tell(f"Measured: a step needed {needed / GB:.2f} GB.")
        if needed > UNLIKE * self.keeping.bytes and self.host.whole is None:
            self.error *= needed / self.keeping.bytes
            self.again()

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor, adapter: Mapping[str, Factors]
    ) -> torch.Tensor:
        """See `comfy_forward.velocity`. adapter: the branch beside the weights, which is attached as well."""
        if self.fast is not None:
            try:
                self.fast.carry(adapter)
                return self.fast.velocity(x, sigma, caption)
            except comfy_blocks.OtherModel as error:
                self.fast, self.why_not = None, str(error)
                self.tell(f"Training goes through the model's own modules, which takes longer: {error}.")
        run_layer = None if self.host.whole == len(self.host.dit.layers) else comfy_forward.checkpointed
        return comfy_forward.velocity(self.host.dit, x, sigma, caption, run_layer)
