"""How much each block keeps for its backward: as much as fits, as little as it takes.

What a block keeps changes no bit of what is learnt (the rest is computed again, by the same kernels), so this may
change from step to step. Sums are of counts and shapes, held to what is measured (`bench memory`).
"""

from dataclasses import dataclass

from .block import Keep
from .memory import GB

SHARE = 0.9  # of the memory that is free, which a plan takes
FP32 = 4
HEIGHT = 8.8  # widths that are there at a block's height, beside what the feed-forward holds


@dataclass(frozen=True)
class Sizes:
    """Of a model and its LoRA. width, inner: of the tokens and in the feed-forward; ranks: of all A's in a block."""

    blocks: int
    width: int
    inner: int
    heads: int
    ranks: int
    itemsize: int  # bytes of a number of the computation
    graph: bool = False  # attention runs under autograd, which keeps q and k once more
    fused: bool = False  # by `compiled`, where the gate's gradient is not in its input's place

    def kept(self, keep: Keep, tokens: int) -> float:
        """Bytes that a block keeps from its forward to its backward."""
        small = FP32 * (4 + 2 * self.heads) + self.itemsize * self.ranks
        sums = 0 if keep == Keep.INPUT else FP32 * self.heads  # of attention's rows
        return tokens * (small + sums + self.itemsize * self._numbers(keep))

    def height(self, tokens: int) -> float:
        """Bytes of a block at its height, the middle of the feed-forward, with what it keeps."""
        return tokens * self.itemsize * (HEIGHT * self.width + (5 if self.fused else 3) * self.inner)

    def spared(self, keep: Keep, tokens: int) -> float:
        """Multiplications for a token that need not be done again."""
        some = self.width * (self.inner + 2 * tokens)
        rest = self.width * (4 * self.width + 2 * self.inner)
        return {Keep.INPUT: 0.0, Keep.ATTENTION: some, Keep.ALL: some + rest}[keep]

    def _numbers(self, keep: Keep) -> int:
        """Kept for each token: x; attention and d; q, k, v, o and u."""
        return {
            Keep.INPUT: self.width,
            Keep.ATTENTION: 3 * self.width,
            Keep.ALL: (9 if self.graph else 7) * self.width + 2 * self.inner,
        }[keep]


@dataclass(frozen=True)
class Keeping:
    """What the blocks keep, first to last, and what that needs. bytes: of a step beside weights and LoRA."""

    blocks: tuple[Keep, ...]
    bytes: float

    def spelled(self) -> str:
        """In words, for the screen."""
        whole, some = (sum(keep == one for keep in self.blocks) for one in (Keep.ALL, Keep.ATTENTION))
        count = len(self.blocks)
        if whole == count:
            how = "all layers are kept, nothing is computed twice"
        else:
            kept = (
                f"{whole} of {count} layers are kept, {some} in part" if some else f"{whole} of {count} layers are kept"
            )
            how = f"{kept}, the rest is computed twice, which takes longer"
        return f"Memory: a step takes about {self.bytes / GB:.2f} GB beside model and LoRA; {how} (keep_layers)."


def needed(sizes: Sizes, tokens: int, blocks: tuple[Keep, ...]) -> float:
    """Bytes of a step at its height: the last block's, beside what is kept by those before it."""
    return sizes.height(tokens) + sum(sizes.kept(keep, tokens) for keep in blocks[:-1])


def plan(sizes: Sizes, tokens: int, free: float, whole: int | None = None) -> Keeping:
    """What the blocks keep in `free` bytes, so that the least is computed again.

    The last blocks keep more than the first: what they keep is gone when the others' turn comes, so some of it costs
    nothing. whole: how many keep everything, whatever is free, and then the others what costs nothing beside those;
    None: as many as fit. With nothing left to give up blocks keep their input, whatever is free.
    """
    count = sizes.blocks
    whole = whole if whole is None else min(whole, count)
    limit = needed(sizes, tokens, mixed(count, 0, whole or 0))
    if whole is None:
        limit = max(limit, SHARE * free)
    best, most = mixed(count, 0, whole or 0), -1.0
    for every in range(whole or 0, count + 1):
        for some in range(count - every, -1, -1):
            blocks = mixed(count, some, every)
            if needed(sizes, tokens, blocks) <= limit:
                spared = sum(sizes.spared(keep, tokens) for keep in blocks)
                best, most = (blocks, spared) if spared > most else (best, most)
                break
    return Keeping(best, needed(sizes, tokens, best))


def mixed(count: int, some: int, every: int) -> tuple[Keep, ...]:
    """So many blocks, of which the last keep everything and some before them attention."""
    return (Keep.INPUT,) * (count - some - every) + (Keep.ATTENTION,) * some + (Keep.ALL,) * every
