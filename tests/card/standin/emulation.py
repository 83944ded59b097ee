"""Two kinds of card that a machine without one can stand in for, out of its own memory.

*dynamic*: core's dynamic VRAM (ModelPatcherDynamic, faults and pins on a VBAR, lowvram patches). Only what needs a
driver is replaced: the memory behind the VBAR and the cast buffers. What has no pin any more can be taken away at
once and is overwritten with NaN, so that a weight that is read after it was given back shows.

*plain*: core's ModelPatcher on a device that is not the one where weights rest, so that they are moved (and how many
is said): what core does on every other card.

cpu:0 is the card: `torch.device("cpu", 0) != torch.device("cpu")`, while tensors of both compute together. Moving a
module there replaces its tensors as moving it to a card does. All else is core's own code.
"""

import ctypes
import importlib
from contextlib import ExitStack, contextmanager
from unittest import mock

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy_aimdo.control
import comfy_aimdo.host_buffer
import comfy_aimdo.model_mmap
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import torch
from comfy.cli_args import args

CARD = torch.device("cpu", 0)
PAGE = 16 * 1024  # bytes; a driver's are 32 MB, and the tiny model has 13
KINDS = ("dynamic", "plain")


class Card:
    """share: of a model's weights that fit. eager: what is not pinned is taken away at once."""

    def __init__(self, kind: str):
        self.kind = kind
        self.bars: list[Bar] = []
        self.fit()

    def fit(self, share: float = 1.0, eager: bool = False):
        self.share, self.eager = share, eager

    def evict(self):
        """Take away all that has no pin, now."""
        for bar in self.bars:
            for page in range(len(bar.pins)):
                bar.evict(page)

    @property
    def pins(self) -> int:
        return sum(sum(bar.pins) for bar in self.bars)


class Bar:
    """A VBAR: memory of a card that core's weights are faulted into page by page, pinned while they are used."""

    def __init__(self, card: Card, size: int):
        self.card, self.max_size, self.offset = card, max(int(size) // 4, PAGE), 0  # core asks for ten times the model
        self.memory = poison(self.max_size)
        pages = -(-self.max_size // PAGE)
        self.serial, self.resident, self.pins, self.watermark = [0] * pages, [False] * pages, [0] * pages, pages
        self.filled = 0  # pages that are resident
        card.bars.append(self)

    def prioritize(self, *_):
        self.watermark = len(self.serial)

    def deprioritize(self): ...

    def alloc(self, size: int):
        self.offset = (self.offset + 511) & ~511
        if self.offset + size > self.max_size:
            raise MemoryError("VBAR OOM")
        at, self.offset = self.offset, self.offset + size
        return self, at, size

    def room(self) -> int:
        """Pages that fit."""
        return int(self.card.share * -(-self.offset // PAGE))

    def evict(self, page: int) -> bool:
        if not self.resident[page] or self.pins[page]:
            return False
        self.resident[page] = False
        self.filled -= 1
        self.memory[page * PAGE : (page + 1) * PAGE] = 0xFF  # NaN in bf16 and fp32
        return True

    def fault(self, at: int, size: int):
        pages = range(at // PAGE, -(-(at + size) // PAGE))
        for page in pages:
            while not self.resident[page] and self.filled >= self.room() and self.watermark > 0:
                self.watermark -= 1
                self.evict(self.watermark)
            if pages[-1] >= self.watermark:
                return None
            if not self.resident[page]:
                self.resident[page] = True
                self.filled += 1
                self.serial[page] += 1
        for page in pages:
            self.pins[page] += 1
        return (ctypes.c_uint32 * len(pages))(*(self.serial[page] for page in pages))

    def unpin(self, at: int, size: int):
        for page in range(at // PAGE, -(-(at + size) // PAGE)):
            self.pins[page] = max(0, self.pins[page] - 1)
            if self.card.eager or page >= self.watermark:
                self.evict(page)

    def loaded_size(self) -> int:
        return self.filled * PAGE

    def free_memory(self, size: int) -> int:
        freed = 0
        while size > freed and self.watermark > 0:
            self.watermark -= 1
            freed += PAGE * self.evict(self.watermark)
        return freed


class Buffer:
    """Where weights that do not fit are cast to for one use."""

    def __init__(self, *_):
        self.memory, self.used = poison(64 * 2**20), 0

    def size(self) -> int:
        return self.used

    def get(self, size: int, offset: int = 0):
        self.used = max(self.used, size + offset)
        return self, offset, size


def poison(size: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((size,), 0xFF, dtype=torch.uint8)


def on_card(core_cast):
    """The tensors here do not say that they lie on the card.

    A weight that core manages there is asked for from there.
    """

    def cast(module, input=None, dtype=None, device=None, *more, **options):
        return core_cast(
            module, input, dtype, CARD if device is None and hasattr(module, "_v") else device, *more, **options
        )

    return cast


def there_already(core_list):
    """On a card, what was moved there stays there, and moving it again does nothing.

    From cpu to cpu:0 it would be copied each time.
    """

    def load_list(self, for_dynamic=False, default_device=None):
        seen, self.model._moved = getattr(self.model, "_moved", False), True
        return core_list(self, for_dynamic, None if seen else default_device)

    return load_list


def partly(core_load, card: Card):
    """Load as much as the card's share says, instead of what this machine has free."""

    def model_load(self, lowvram_model_memory=0, force_patch_weights=False):
        room = 0 if card.share >= 1 else max(0.1, card.share * self.model_memory())
        return core_load(self, room, force_patch_weights)

    return model_load


def need_library():
    """Host buffers and mapped files are comfy-aimdo's own, which ComfyUI does not load on a CPU."""
    if comfy_aimdo.control.lib is None:
        comfy_aimdo.control.init()
        for module in (comfy_aimdo.host_buffer, comfy_aimdo.model_mmap):
            importlib.reload(module)


@contextmanager
def card(kind: str):
    """While open, core works as on a card of this kind. Nothing of it is left in core afterwards."""
    one, mm = Card(kind), comfy.model_management
    need_library()
    with ExitStack() as stack:
        swap = lambda place, name, value: stack.enter_context(mock.patch.object(place, name, value))  # noqa: E731
        stack.callback(leave)
        swap(mm, "get_torch_device", lambda: CARD)
        swap(mm, "text_encoder_device", lambda: CARD)
        swap(mm, "is_device_cpu", lambda device: getattr(device, "type", None) == "cpu" and device.index is None)
        swap(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
        swap(args, "disable_pinned_memory", True)  # pins of main memory need a driver
        if kind == "dynamic":
            swap(comfy_aimdo.model_vbar, "ModelVBAR", lambda size, index: Bar(one, size))
            swap(comfy_aimdo.vram_buffer, "VRAMBuffer", Buffer)
            swap(
                comfy_aimdo.torch,
                "aimdo_to_tensor",
                lambda place, device: place[0].memory[place[1] : place[1] + place[2]],
            )
            swap(comfy.memory_management, "aimdo_enabled", True)
            swap(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
            swap(
                comfy.model_patcher.ModelPatcher,
                "_load_list",
                there_already(comfy.model_patcher.ModelPatcher._load_list),
            )
            swap(comfy.ops, "cast_bias_weight", on_card(comfy.ops.cast_bias_weight))
        else:
            swap(mm.LoadedModel, "model_load", partly(mm.LoadedModel.model_load, one))
        yield one


def leave():
    """Core forgets the models that it had loaded, and the buffers of the card."""
    with torch.inference_mode():
        comfy.model_management.free_memory(1e30, CARD)
    comfy.model_management.current_loaded_models.clear()
    comfy.model_management.reset_cast_buffers()
