"""A LoRA file of any dialect to our one, at another rank if wished, with the error stated.

A resize is the truncated singular value decomposition of each difference, which no LoRA of that rank can beat
(Eckart and Young, 1936). It never builds the difference: a product B A has the singular values of the small core
R_B R_A^T of its two QR decompositions, a Kronecker product those of its two matrices multiplied with each other,
and LoHa is a product of rank r^2. All of it in fp64.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import lorafile, loraforms, loranames, modelfile, network
from .errors import LoraFileError
from .lorafile import LoraFile, LoraState
from .lowrank import Difference, Factors
from .lycoris import LoHa, LoKr
from .peft_config import HEADER

# (LoRA, file) -> (part's name -> clean weight [out, in])
Weights = Callable[[dict[str, Difference], str], Callable[[str], torch.Tensor]]

# what a path of a machine looks like: /a/b, ~/a, C:\a, \\server
PATH = re.compile(r"""(?:^|["'\s=(\[])(?:/[\w.\-+]+/|~/|\\\\\w)|^/[\w.\-+ ]+$|(?<![A-Za-z])[A-Za-z]:[\\/]""")
STALE = {HEADER, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}  # said of the source's tensors
OF_THE_NETWORK = {"ss_network_module", "ss_network_args", "ss_network_dim", "ss_network_alpha"}


@dataclass(frozen=True)
class Converted:
    """What a conversion gives: the tensors with their metadata, and a report for people."""

    state: LoraState
    report: str


def convert(path: str | Path, rank: int, dtype: str, weights: Weights | None = None) -> Converted:
    """The file's LoRA in our dialect.

    rank: 0 keeps it; else every part is a plain LoRA of at most that rank. dtype: of `lorafile.DTYPES`.
    weights: the model's, for a DoRA with a length for each row (PEFT's, LyCORIS'). Core takes the clean weight's rows
    where their trainers take the changed ones', so the lengths are brought to what draws the same.

    Raises LoraFileError for what is not understood as a whole, and for a DoRA to be resized.
    """
    path = Path(path)
    if path.suffix.lower() not in modelfile.SUFFIXES:
        raise LoraFileError(_no_safetensors(path.name))
    source = lorafile.read(path, keep_fused=rank > 0)
    beside = {key: word for key in source.leftover if (word := loranames.aside(key)[0])}
    unknown = [key for key in source.leftover if key not in beside]
    lorafile.need_all(source.factors, unknown, path.name)
    notes = list(source.notes)
    if beside:
        left_out = loranames.counted(beside.values())
        notes.append(f"Left out are {left_out}: the form that everything reads has no place for them.")
    if rank:
        before, after = _resized(source.factors, rank, path.name)
    else:
        before = after = with_row_lengths(source.factors, weights, notes, path.name)
    state = lorafile.state_dict(after, lorafile.DTYPES[dtype])
    if broken := loraforms.not_finite(state):
        raise LoraFileError(f"{broken} has numbers that are too large for {dtype}. Choose bf16 or fp32.")
    written = lorafile.parse(state)[0]
    whole, worst, name = errors(before, written)
    error = f"{whole:.3g} of the whole, {worst:.3g} in the worst part ({name})" if whole else "none: the same numbers"
    report = _report(path, source, written, dtype, sum(tensor.nbytes for tensor in state.values()), error, notes)
    return Converted(LoraState(state, metadata(source, written, whole)), report)


def _resized(
    factors: dict[str, Difference], rank: int, file: str
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """(the source, resized), both with qkv in three."""
    before: dict[str, Difference] = {}
    after: dict[str, Difference] = {}
    for name, one in factors.items():
        if network.form(one) == "DoRA":
            raise LoraFileError(_dora_resized(file, name))
        small = resize(one, rank)
        if name.endswith("attention.qkv"):
            after |= loraforms.split_fused(name, small, file)
            before[name] = one
        else:
            before[name], after[name] = one, small
    return before, after


def resize(one: Difference, rank: int) -> Difference:
    """The nearest plain LoRA of at most this rank, in fp32, with equal lengths of A and B and no alpha.

    A plain LoRA that is small enough stays what it is.
    """
    if isinstance(one, Factors) and one.rank <= rank:
        return one
    U, S, V = singular(one, rank)
    root = S.sqrt()
    return Factors((V * root).T.float().contiguous(), (U * root).float().contiguous())


def singular(one: Difference, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [out, n], S [n], V [in, n]) in fp64: the largest singular values, falling, with their vectors.

    n is at most `count`.
    """
    if isinstance(one, LoKr):
        return _singular_kron(one, count)
    B, A = product(one)
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U[:, :count], S[:count], Qa @ Vh[:count].T


def _singular_kron(one: LoKr, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kron(U1 S1 V1^T, U2 S2 V2^T) = kron(U1, U2) kron(S1, S2) kron(V1, V2)^T."""
    w1, w2 = one.matrices(torch.float64)
    U1, S1, V1 = torch.linalg.svd(w1, full_matrices=False)
    U2, S2, V2 = torch.linalg.svd(w2, full_matrices=False)
    S, order = torch.outer(S1, S2).flatten().sort(descending=True)
    first, second = order[:count] // len(S2), order[:count] % len(S2)
    U = (U1[:, None, first] * U2[None, :, second]).flatten(0, 1)
    V = (V1.T[:, None, first] * V2.T[None, :, second]).flatten(0, 1)
    return U, S[:count] * one.scale, V


def product(one: Difference) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [out, n], A [n, in]) in fp64 with B A the difference: LoRA's own, or LoHa's with n = rank^2."""
    if isinstance(one, LoHa):
        w1_a, w1_b, w2_a, w2_b = (tensor.double() for tensor in one.tensors.values())
        B = one.scale * (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        A = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
        return B, A
    assert isinstance(one, Factors)
    return one.scale * one.B.double(), one.A.double()


def inner(one: Difference, two: Difference) -> float:
    """Sum over all places of one's number times two's, without building either."""
    if isinstance(one, LoKr) and isinstance(two, LoKr) and one.w1.shape == two.w1.shape:
        (a1, a2), (b1, b2) = one.matrices(torch.float64), two.matrices(torch.float64)
        return one.scale * two.scale * ((a1 * b1).sum() * (a2 * b2).sum()).item()
    if isinstance(two, LoKr):
        one, two = two, one
    B, A = product(two)
    if isinstance(one, LoKr):
        return (one.output(A) * B.T).sum().item()
    B1, A1 = product(one)
    return ((B1.T @ B) * (A1 @ A.T)).sum().item()


def errors(before: dict[str, Difference], after: dict[str, Difference]) -> tuple[float, float, str]:
    """Relative Frobenius errors: (of the whole, of the worst part, its name).

    A fused qkv of `before` meets its three parts. Good to about 1e-8.
    """
    lost = total = worst = 0.0
    where = ""
    for name, one in before.items():
        whole = name in after
        two = after[name] if whole else _stacked(after, name.removesuffix("qkv"))
        size = inner(one, one)
        gone = 0.0 if whole and _same(one, two) else max(0.0, size + inner(two, two) - 2 * inner(one, two))
        lost, total = lost + gone, total + size
        if size and (gone / size) ** 0.5 > worst:
            worst, where = (gone / size) ** 0.5, name
    return (lost / total) ** 0.5 if total else 0.0, worst, where


def _stacked(factors: dict[str, Difference], stem: str) -> Factors:
    """to_q, to_k and to_v of a resized fused LoRA, which share A, as one again."""
    parts = [factors[f"{stem}to_{letter}"] for letter in "qkv"]
    assert all(isinstance(part, Factors) for part in parts)
    B = torch.cat([part.tensors["lora_B.weight"] for part in parts])
    return Factors(parts[0].tensors["lora_A.weight"], B, parts[0].scale)


def _same(one: Difference, two: Difference) -> bool:
    """The same form with the same numbers?"""
    if type(one) is not type(two) or not math.isclose(one.scale, two.scale, rel_tol=1e-12):
        return False
    return all(torch.equal(tensor.double(), two.tensors[name].double()) for name, tensor in one.tensors.items())


def with_row_lengths(
    factors: dict[str, Difference], weights: Weights | None, notes: list[str], file: str
) -> dict[str, Difference]:
    """A DoRA's lengths per output row, as core understands them.

    Its trainer draws m (W + D) / |W + D|, core m (W + D) / |W|, row by row. Without the weights they stay what they
    are, and a note says what that means.
    """
    by_row = {name for name, one in factors.items() if _has_row_lengths(one)}
    if not by_row:
        return factors
    if weights is None:
        notes.append(_row_lengths_kept(len(by_row)))
        return factors
    weight = weights(factors, file)
    notes.append(_row_lengths_brought(len(by_row)))
    return {name: _for_core(one, weight(name)) if name in by_row else one for name, one in factors.items()}


def _has_row_lengths(one: Difference) -> bool:
    return isinstance(one, Factors) and one.magnitude is not None and one.magnitude.shape[0] > 1


def _for_core(one: Difference, weight: torch.Tensor) -> Difference:
    assert isinstance(one, Factors) and one.magnitude is not None
    clean = weight.double()
    changed = clean + one.delta().to(clean)
    gain = clean.norm(dim=1, keepdim=True) / changed.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return replace(one, magnitude=(one.magnitude.double() * gain.cpu()).float())


def metadata(source: LoraFile, written: dict[str, Difference], error: float) -> dict[str, str]:
    """The source's, but for paths of a machine and what is no longer true, with where it came from."""
    kept = {
        key: value
        for key, value in source.metadata.items()
        if key not in STALE and (value.startswith("data:") or not PATH.search(value))
    }
    ranks = sorted({one.rank for one in written.values()})
    if ranks != source.ranks or _forms(written) != _forms(source.factors):
        kept = {key: value for key, value in kept.items() if key not in OF_THE_NETWORK}
        kept |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(ranks[-1]),
            "ss_network_alpha": str(ranks[-1]),
        }
    return kept | {
        "zturbo.converted_from": f"{source.dialect}, {_forms(source.factors)}",
        "zturbo.conversion_error": f"{error:.3g}",
    }


def _forms(factors: dict[str, Difference]) -> str:
    return " and ".join(sorted({network.form(one) for one in factors.values()}))


def _report(
    path: Path, source: LoraFile, written: dict[str, Difference], dtype: str, size: int, error: str, notes: list[str]
) -> str:
    """Lines for people."""
    lines = [
        f"{path.name}: {_forms(source.factors)} under the names {source.dialect}, {len(source.factors)} matrices.",
        f"Was: rank {_ranks(source.factors)}, {', '.join(source.dtypes)}, {path.stat().st_size / 1e6:.2f} MB.",
        f"Is: {_forms(written)}, {len(written)} matrices, rank {_ranks(written)}, {dtype}, {size / 1e6:.2f} MB.",
        f"Error (relative, Frobenius): {error}.",
    ]
    return "\n".join(lines + notes)


def _ranks(factors: dict[str, Difference]) -> str:
    ranks = sorted({one.rank for one in factors.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


# What is said


def _no_safetensors(file: str) -> str:
    return (
        f"{file} is no safetensors file. Other kinds can run code when they are opened: "
        "save it as safetensors in the program that made it."
    )


def _dora_resized(file: str, part: str) -> str:
    return (
        f"{file} is a DoRA ({part}), which cannot be resized without its model: "
        "its lengths belong to its very matrices. Set rank to 0."
    )


def _row_lengths_kept(count: int) -> str:
    return (
        f"{count} parts are DoRA with a length for each output row. ComfyUI divides these by the rows of the clean"
        " weight, their trainer by those of the changed one: give the model that it was trained on, and they are"
        " brought to what draws as in training."
    )


def _row_lengths_brought(count: int) -> str:
    return (
        f"{count} parts are DoRA with a length for each output row; "
        "these were brought to what ComfyUI reads, with the model's weights."
    )
