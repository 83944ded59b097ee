"""How much each block keeps for its backward: as much as fits, as little as it takes.

What a block keeps changes no bit of what is learnt (the rest is computed again, by the same kernels), so this may
change from step to step. Sums are of counts and shapes, held to what is measured (`bench memory`).
"""

from dataclasses import dataclass

from .block import Keep
from .memory import GB, Need

SHARE = 0.9  # of the memory that is free, which a plan takes
FP32 = 4
# widths that are there in the middle of a backward, beside what the feed-forward holds
HEIGHT = {Keep.INPUT: 12.5, Keep.ATTENTION: 10.5, Keep.ALL: 8.5}


@dataclass(frozen=True)
class Sizes:
    """Of a model and its LoRA. width, inner: of the tokens and in the feed-forward; ranks: of all A's in a block."""

    blocks: int
    width: int
    inner: int
    heads: int
    ranks: int
    itemsize: int  # bytes of a number of the computation

    def kept(self, keep: Keep, tokens: int) -> float:
        """Bytes that a block keeps from its forward to its backward."""
        small = FP32 * (4 + 2 * self.heads) + self.itemsize * self.ranks
        sums = 0 if keep == Keep.INPUT else FP32 * self.heads  # of attention's rows
        return tokens * (small + sums + self.itemsize * self._numbers(keep))

    def moment(self, keep: Keep, tokens: int) -> float:
        """Bytes of a block's backward at its height, the middle of the feed-forward's, beside what it kept."""
        height = HEIGHT[keep] * self.width + 5 * self.inner
        return tokens * self.itemsize * (height - self._numbers(keep))

    def _numbers(self, keep: Keep) -> int:
        """Kept for each token: x; attention and d; q, k, v, o and u."""
        return {
            Keep.INPUT: self.width,
            Keep.ATTENTION: 3 * self.width,
            Keep.ALL: 7 * self.width + 2 * self.inner,
        }[keep]


@dataclass(frozen=True)
class Keeping:
    """What the blocks keep, first to last, and what that needs. bytes: of a step beside weights and LoRA."""

    blocks: tuple[Keep, ...]
    bytes: float

    @property
    def need(self) -> Need:
        return Need("a step's activations", self.bytes)

    def spelled(self) -> str:
        """In words, for the screen."""
        whole, some = (sum(keep == one for keep in self.blocks) for one in (Keep.ALL, Keep.ATTENTION))
        if whole == len(self.blocks):
            how = "All layers keep what their backward needs."
        elif whole + some == 0:
            how = "All layers are computed again in the backward."
        else:
            again = len(self.blocks) - whole - some
            parts = [(whole, "keep what their backward needs"), (some, "keep attention"), (again, "keep nothing")]
            how = f"Of {len(self.blocks)} layers " + ", ".join(f"{n} {what}" for n, what in parts if n) + "."
        return f"{how} A step needs {self.bytes / GB:.2f} GB beside the weights and the LoRA."


def needed(sizes: Sizes, tokens: int, blocks: tuple[Keep, ...]) -> float:
    """Bytes of a step at its height: all that is kept when the last block's backward begins, and that backward."""
    kept = sum(sizes.kept(keep, tokens) for keep in blocks)
    return kept + max(sizes.moment(keep, tokens) for keep in set(blocks))


def plan(sizes: Sizes, tokens: int, free: float, whole: int | None = None) -> Keeping:
    """What the blocks keep in `free` bytes: attention first, which costs the least for what it saves; then everything.

    whole: how many keep everything, the last ones, whatever is free; None: as many as fit. With nothing left to give
    up they keep their input, whatever is free.
    """

    def made(*counts: tuple[Keep, int]) -> Keeping:
        blocks = tuple(keep for keep, count in counts for _ in range(count))
        return Keeping(blocks, needed(sizes, tokens, blocks))

    count = sizes.blocks
    if whole is not None:
        whole = min(whole, count)
        return made((Keep.INPUT, count - whole), (Keep.ALL, whole))
    found = made((Keep.INPUT, count))
    for low, high in ((Keep.INPUT, Keep.ATTENTION), (Keep.ATTENTION, Keep.ALL)):
        for number in range(1, count + 1):
            better = made((low, count - number), (high, number))
            if better.bytes > SHARE * free:
                return found
            found = better
    return found
