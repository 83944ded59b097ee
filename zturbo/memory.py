"""What a run needs of memory: sums from counts and shapes, held to what was measured (`bench full`, `bench gpu`).

What happens when it runs out all the same is in `Session.save_memory`, what is given up for it in `roles.Host`.
"""

from dataclasses import dataclass

from . import health
from .family import Z_IMAGE
from .recipe import Recipe

# numbers of tokens x width that a layer keeps for its backward: what an H200 held at 512 and 1024 pixels; counted on
# autograd's graph at a fifth of the width, with the real proportions, in tests/comfy/test_memory.py
KEPT = 28.2
# with gradient checkpointing a layer keeps its input; beside that one layer at a time is whole, forward and backward
WHOLE = 31
# bytes that an optimizer keeps for each trained number
STATE = {
    "adamw": 8,
    "adamw8bit": 2.1,
    "adafactor": 2.3,
    "prodigy": 16,
    "schedule_free": 8,
    "lion": 4,
    "came": 4.5,
    "muon": 4,
}
RECOMPUTING = "gradient checkpointing"
OWN = 0.07e9  # bytes of what a first step brings into the process beside tensors: measured with 3, 8 and 30 layers
GB = 1e9


@dataclass(frozen=True)
class Need:
    """A part of the sum. size: bytes."""

    what: str
    size: float


def lora(recipe: Recipe, numbers: int) -> Need:
    """The LoRA in fp32, its gradients, the optimizer's state, the moving average."""
    each = 8 + STATE[recipe.optimizer.name] + (4 if recipe.optimizer.ema else 0)
    return Need("the LoRA with its optimizer", each * numbers)


def copy(recipe: Recipe, numbers: int) -> Need:
    """What is learnt once more in main memory, while a checkpoint and the LoRA are written from it."""
    each = 4 + STATE[recipe.optimizer.name] + (4 if recipe.optimizer.ema else 0) + 2
    return Need("a checkpoint while it is written", each * numbers)


def together(recipe: Recipe, picture: int, guarded: int, at_once: int | None = None) -> int:
    """Tokens that go through the model at once: of the batch's pictures, or of those that the guard holds.

    picture, guarded: of one. at_once: so many at most; None or 0: all.
    """
    return max(
        min(recipe.batch_size, at_once or recipe.batch_size) * picture,
        min(_held(recipe), at_once or health.ANCHORS) * guarded,
    )


def most(recipe: Recipe) -> int:
    """Pictures that a step has at once, where there is room."""
    return max(recipe.batch_size, _held(recipe))


def one_by_one(recipe: Recipe, at_once: int | None) -> bool:
    """Does no more than one picture go through the model at once?"""
    return (at_once or most(recipe)) == 1


def fewer(recipe: Recipe, at_once: int | None) -> int:
    """Half as many pictures at once, at least one."""
    return max(1, (at_once or most(recipe)) // 2)


def _held(recipe: Recipe) -> int:
    return 0 if recipe.turbo.keep == "off" else health.ANCHORS


def at_a_time(count: int) -> str:
    """In words."""
    return "one picture at a time" if count == 1 else f"{count} pictures at a time"


def activations(tokens: int, width: int, layers: int, itemsize: int, checkpointing: bool) -> Need:
    """What one forward and backward keeps. tokens: see `together`; width: of the model; itemsize: bytes of a number."""
    each = layers + WHOLE if checkpointing else KEPT * layers + WHOLE - KEPT
    return Need("a step's activations", tokens * width * itemsize * each)


def tokens(pixels: int, caption: str) -> int:
    """Of a picture with so many pixels and its caption, before either is encoded.

    A token is 16 x 16 pixels, or a little under three letters.
    """
    words = 16 + len(caption.encode()) / 2.8  # 16: what the template adds
    return padded(pixels // Z_IMAGE.grain**2) + padded(int(min(words, 512)))


def padded(count: int) -> int:
    """Tokens come in 32s."""
    return -(-count // 32) * 32


def total(needs: list[Need]) -> float:
    return sum(need.size for need in needs)


def spelled(needs: list[Need]) -> str:
    """The sum in words: `12.3 GB the model + 0.7 GB the LoRA with its optimizer = 13.0 GB`."""
    parts = [f"{need.size / GB:.1f} GB {need.what}" for need in needs if need.size >= 0.05 * GB]
    if len(parts) == 1:
        return parts[0]
    return f"{' + '.join(parts)} = {total(needs) / GB:.1f} GB" if parts else f"{total(needs) / GB:.2f} GB"
