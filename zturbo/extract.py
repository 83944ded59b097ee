"""An adapter out of two checkpoints: the difference of their weights, as near as a rank allows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import ZTurboError
from .lowrank import Factors, Target

Weights = Callable[[str], torch.Tensor]
NOTHING_TO_EXTRACT = (
    "The two models are the same in every matrix: there is nothing to extract. "
    "Choose a de-distilled or undistilled model, and turbo."
)


def _other_family(part: str, one: tuple[int, ...], two: tuple[int, ...]) -> str:
    return f"{part} is {one} in one model and {two} in the other: they are not of one family."


@dataclass(frozen=True)
class Extracted:
    """An adapter, and how near it is to the difference that it stands for.

    error: of the whole difference's length, what the rank leaves out, 0 to 1; worst: the part with the largest error of
    its own; alike: parts that do not differ.
    """

    factors: dict[str, Factors]
    error: float
    worst: tuple[str, float]
    alike: int

    def report(self, rank: int) -> str:
        lines = [
            f"{len(self.factors)} matrices at rank {rank}.",
            f"Of the difference's length the rank leaves out {self.error:.1%};"
            f" most in {self.worst[0]}, {self.worst[1]:.1%}.",
        ]
        if self.alike:
            lines.append(f"{self.alike} matrices are the same in both and were left out.")
        if self.error > 1 / 3:
            lines.append("Above a third the adapter is a rough one: take a higher rank.")
        return " ".join(lines)


def extract(
    to: Weights, origin: Weights, targets: list[Target], rank: int, check: Callable[[], None] = lambda: None
) -> Extracted:
    """B A nearest to `to` minus `origin` (Eckart and Young, 1936), part by part, in fp32, split evenly between B and A.

    Raises ZTurboError when the two do not differ. check: called between two parts; may raise.
    """
    factors, missed, whole, worst, alike = {}, 0.0, 0.0, ("", -1.0), 0
    for part in (part for target in targets for part in target.parts):
        check()
        one, two = to(part.name), origin(part.name)
        if one.shape != two.shape:
            raise ZTurboError(_other_family(part.name, tuple(one.shape), tuple(two.shape)))
        difference = one - two
        square = difference.square().sum().item()
        if not torch.isfinite(difference).all():
            raise ZTurboError(f"{part.name} has numbers that are none in one of the models. Load another file.")
        if square == 0:
            alike += 1
            continue
        U, S, Vh = low_rank(difference, rank)
        left = max(0.0, square - S.square().sum().item())
        missed, whole = missed + left, whole + square
        worst = max(worst, (part.name, (left / square) ** 0.5), key=lambda found: found[1])
        factors[part.name] = Factors((S.sqrt()[:, None] * Vh).contiguous(), (U * S.sqrt()).contiguous())
    if not factors:
        raise ZTurboError(NOTHING_TO_EXTRACT)
    return Extracted(factors, (missed / whole) ** 0.5, worst, alike)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [out, r], S [r], Vh [r, in]): the largest r = min(rank, out, in) singular values.

    Exact for small matrices, by random projections with power steps for large ones (arXiv 0909.4061).
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(512, 2 * rank):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], rank + 16, generator=generator).to(matrix)).Q
    for _ in range(4):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vh[:rank]
