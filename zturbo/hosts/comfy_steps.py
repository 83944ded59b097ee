"""Which way a step goes through NextDiT, and how much of it is kept for the backward.

The fast way (`comfy_blocks`) where the layers and the LoRA are what it knows, else the model's own modules.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .. import compiled, keeping, kernels, lowrank, memory
from ..keeping import FP32, Keeping
from ..lowrank import Difference, Factors
from ..memory import GB
from . import comfy_adapter, comfy_blocks, comfy_forward, comfy_needs, devices

if TYPE_CHECKING:
    from .comfy import ComfyHost

log = logging.getLogger("zturbo")
UNLIKE = 1.05  # times what was planned: from then on the plan is made anew


class Steps:
    """The steps of a host. `begin` comes each time that the model is loaded, `end` when it is taken away."""

    def __init__(self, host: ComfyHost):
        self.host = host
        self.fast: comfy_blocks.Fast | None = None
        self.why_not = ""  # the fast way is not gone
        self.keeping: Keeping | None = None
        self.lora: Mapping[str, Difference] = {}
        self.tokens = 0
        self.notes: list[str] = []
        self.ops: Any = kernels  # or a Compiled
        self.compiling = ""  # what was said of that
        self.stepped = False  # all that stays between steps is allocated
        self.baseline: float | None = None  # bytes allocated between two steps
        self.measured = False
        self.error = 1.0  # what a step needed, as a multiple of the plan

    def told(self) -> list[str]:
        """See `roles.Host.told`. A step is over."""
        self.stepped = True
        if self.fast is not None:
            self.measure()
        if isinstance(self.ops, compiled.Compiled) and self.ops.sentence() != self.compiling:
            self.compiling = self.tell(self.ops.sentence())
        notes, self.notes = self.notes, []
        return notes

    @property
    def recomputes(self) -> bool:
        """Is as little kept for the backward as can be?"""
        if self.why_not:
            return self.host.whole != len(self.host.dit.layers)
        if self.host.whole == 0 or self.keeping is None:
            return self.host.whole == 0
        sizes = comfy_needs.sizes_of(self.host, self.lora)
        return self.keeping.blocks == keeping.plan(sizes, self.tokens, 0, 0).blocks

    def decide(self, lora: dict[str, Difference]):
        """Which way to go, and how many pictures go through at once; that once for a run, as bits depend on it."""
        host = self.host
        self.why_not = self.why_not or comfy_blocks.usable(host.dit, lora, host.device)
        if not lora or host.at_once is not None:
            return
        host.at_once = comfy_needs.fitting(host, lora, fast=not self.why_not)
        if host.at_once:
            self.tell(NOT_TOGETHER.format(some=memory.at_a_time(host.at_once), most=memory.most(host.recipe)))

    def room(self, lora: dict[str, Difference]) -> int:
        """Bytes that the memory manager is asked to keep free beside the weights: the least that a step takes.

        Where layers are to be kept, all that they take.
        """
        host = self.host
        return comfy_needs.at_least(host, lora, host.at_once, host.whole, fast=not self.why_not)

    def begin(self, linears, lora: dict[str, Difference]):
        """The model is loaded with these Linears. Without a LoRA nothing is kept for a backward."""
        host = self.host
        if self.why_not:
            log.info("Through the model's own modules: %s.", self.why_not)
            return
        like = torch.empty(0, device=host.device, dtype=host.dtype)
        self.fast = comfy_blocks.Fast(host.dit, linears, comfy_adapter.targets(host.dit), lora, like)
        compute = host.recipe.compute
        why_not = compiled.why_not(host.device, compute.compile, compute.repeat)
        self.ops = kernels if why_not else compiled.shared()
        for block in self.fast.blocks.values():
            block.ops = self.ops
        if why_not and compute.compile == "on":
            self.compiling = self.compiling or self.tell(f"Not compiled: {why_not}.")
        if lora:
            before, self.lora, self.tokens = self.tokens, lora, host.tokens(host.at_once)
            if before != self.tokens:
                self.keeping = None
            self.plan()

    def end(self):
        self.fast = None

    def plan(self):
        """How much the blocks keep, out of what is free now. As before, where that still fits."""
        host, before, numbers = self.host, self.keeping, lowrank.count(self.lora)
        coming = 0.0
        if not self.stepped:  # the LoRA itself is there
            coming = memory.total(comfy_needs.of_step(host, numbers, self.tokens, 0.0)) - FP32 * numbers
        free = (comfy_needs.free(host) - coming) / self.error
        if before is None or host.whole is not None or before.bytes > keeping.SHARE * free:
            self.keeping = self.planned(free)
        assert self.keeping is not None and self.fast is not None
        for block, keep in zip(self.fast.layers, self.keeping.blocks):
            block.keep = keep
        if before is None or before.blocks != self.keeping.blocks:
            self.tell(self.keeping.spelled())
            self.baseline, self.measured = None, False

    def planned(self, free: float) -> Keeping:
        return keeping.plan(comfy_needs.sizes_of(self.host, self.lora), self.tokens, free, self.host.whole)

    def measure(self):
        """Where the device counts, the second step of a plan is held against it."""
        if self.measured or self.keeping is None:
            return
        if self.baseline is None:
            self.baseline = devices.begin_peak(self.host.device)
            return
        self.measured, needed = True, devices.peak(self.host.device) - self.baseline
        log.info("A step needs %.2f GB; planned were %.2f.", needed / GB, self.keeping.bytes / GB)
        if needed > UNLIKE * self.keeping.bytes and self.host.whole is None:
            self.tell(f"A step took {needed / GB:.1f} GB, more than was planned.")
            self.error *= needed / self.keeping.bytes
            self.keeping = None
            self.plan()

    def tell(self, sentence: str) -> str:
        self.notes.append(sentence)
        return sentence

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor, adapter: Mapping[str, Factors]
    ) -> torch.Tensor:
        """See `comfy_forward.velocity`. adapter: the branch beside the weights, which is attached as well."""
        if self.fast is not None:
            try:
                self.fast.carry(adapter)
                return self.fast.velocity(x, sigma, caption)
            except comfy_blocks.OtherModel as error:
                self.fast = self.keeping = None
                self.why_not = str(error)
                self.tell(f"Training goes through the model's own modules, which takes longer: {error}.")
        run_layer = None if self.host.whole == len(self.host.dit.layers) else comfy_forward.checkpointed
        return comfy_forward.velocity(self.host.dit, x, sigma, caption, run_layer)


NOT_TOGETHER = (
    "Memory: {some} through the model, as there is no room for {most} at once. What is learnt is the same but for "
    "rounding."
)
