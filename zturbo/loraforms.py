"""Forms of a LoRA: LoRA, DoRA, LoKr and LoHa, made of a part's tensors, scaled, and split where q, k and v are one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from .errors import LoraFileError
from .lowrank import Difference, Factors
from .lycoris import LoHa, LoKr

SCALES = {"alpha", "dora_scale"}
LARGEST = 2**28  # numbers of a matrix; the largest of Z-Image has 2**25
BY_ROWS = {"lora_B.weight", "hada_w1_a", "hada_w2_a", "lokr_w1"}


def difference(name: str, parts: dict[str, torch.Tensor], file: str) -> Difference:
    """A part of a LoRA, of its tensors by our names of them. Raises LoraFileError where they do not make one."""
    _check_numbers(name, parts, file)
    alpha = parts.get("alpha")
    kinds = parts.keys() - SCALES
    family = next((family for family in FORMS if any(kind.startswith(family) for kind in kinds)), None)
    if family is None:
        raise LoraFileError(_no_matrices(file, name, list(parts)))
    if "dora_scale" in parts and family != "lora_":
        raise LoraFileError(f"{file}: {name} is a LoKr or LoHa with weight decomposition, which is not understood.")
    one = FORMS[family](name, parts, None if alpha is None else alpha.item(), file)
    if math.prod(one.shape) > LARGEST:
        raise LoraFileError(_too_large(file, name, one.shape))
    return one


def _check_numbers(name: str, parts: dict[str, torch.Tensor], file: str):
    """Raise LoraFileError where the tensors of a part hold what no LoRA holds."""
    for kind, tensor in parts.items():
        if kind != "alpha" and not tensor.is_floating_point():
            raise LoraFileError(f"{file}: {name} holds {tensor.dtype} numbers; a LoRA has floating point ones.")
    for kind, tensor in parts.items():
        if tensor.ndim > 4:
            raise LoraFileError(f"{file}: {kind} of {name} has {tensor.ndim} dimensions; a LoRA has matrices.")
    alpha = parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoraFileError(f"{file}: the alpha of {name} has the shape {tuple(alpha.shape)}; it must be one number.")
    if broken := not_finite(parts):
        raise LoraFileError(_numbers_not_finite(file, f"{broken} of {name}"))


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the first with a number that is none, or is infinite; else nothing."""
    return next((name for name, tensor in tensors.items() if not tensor.float().isfinite().all()), "")


def _matrices(name: str, parts: dict[str, torch.Tensor], kinds: tuple[str, ...], file: str) -> list[torch.Tensor]:
    missing = [kind for kind in kinds if kind not in parts]
    if missing:
        raise LoraFileError(f"{file} has only {', '.join(parts)} of {name}: {', '.join(missing)} is missing.")
    flat = [_flat(parts[kind]) for kind in kinds]
    if any(tensor.ndim != 2 or not tensor.numel() for tensor in flat):
        shapes = ", ".join(str(tuple(parts[kind].shape)) for kind in kinds)
        raise LoraFileError(f"{file}: the parts of {name} are no matrices: {shapes}.")
    return flat


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution's as a matrix; any other as it is."""
    return tensor.flatten(2).squeeze(2) if tensor.ndim > 2 and tensor.shape[2:].numel() == 1 else tensor


def _fit(name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]], file: str):
    for down, up in pairs:
        if down.shape[0] != up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise LoraFileError(f"{file}: the matrices of {name} do not fit each other: {shapes}.")


def _lora(name: str, parts: dict[str, torch.Tensor], alpha: float | None, file: str) -> Factors:
    A, B = _matrices(name, parts, ("lora_A.weight", "lora_B.weight"), file)
    _fit(name, [(A, B)], file)
    magnitude = parts.get("dora_scale")
    if magnitude is not None and magnitude.ndim == 1:
        magnitude = magnitude[:, None]  # PEFT's: one length for each output row
    by_column, by_row = (1, A.shape[1]), (B.shape[0], 1)
    if magnitude is not None and magnitude.shape not in (by_column, by_row):
        shapes = f"the shape {tuple(magnitude.shape)}; it must be {by_column} or {by_row}"
        raise LoraFileError(f"{file}: the dora_scale of {name} has {shapes}.")
    return Factors(A, B, 1.0 if alpha is None else alpha / A.shape[0], magnitude)


def _lokr(name: str, parts: dict[str, torch.Tensor], alpha: float | None, file: str) -> LoKr:
    if "lokr_w1" not in parts:
        up, down = _matrices(name, parts, ("lokr_w1_a", "lokr_w1_b"), file)
        _fit(name, [(down, up)], file)
        if up.shape[0] * down.shape[1] > LARGEST:
            size = f"{up.shape[0]}x{down.shape[1]}"
            raise LoraFileError(f"{file}: lokr_w1 of {name} would be {size}, larger than any model's matrix.")
    w1 = _matrices(name, parts, ("lokr_w1",), file)[0] if "lokr_w1" in parts else up.float() @ down.float()
    rank = None if "lokr_w1" in parts else down.shape[0]
    if "lokr_w2" in parts:
        (w2,) = _matrices(name, parts, ("lokr_w2",), file)
        return LoKr(w1 if rank is None or alpha is None else w1 * (alpha / rank), (w2,))
    w2_a, w2_b = _matrices(name, parts, ("lokr_w2_a", "lokr_w2_b"), file)
    _fit(name, [(w2_b, w2_a)], file)
    return LoKr(w1, (w2_a, w2_b), 1.0 if alpha is None else alpha / w2_b.shape[0])


def _loha(name: str, parts: dict[str, torch.Tensor], alpha: float | None, file: str) -> LoHa:
    w1_a, w1_b, w2_a, w2_b = _matrices(name, parts, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), file)
    _fit(name, [(w1_b, w1_a), (w2_b, w2_a)], file)
    if (w1_a.shape[0], w1_b.shape) != (w2_a.shape[0], w2_b.shape):
        raise LoraFileError(f"{file}: the two products of {name} do not fit each other.")
    return LoHa(w1_a, w1_b, w2_a, w2_b, 1.0 if alpha is None else alpha / w1_b.shape[0])


FORMS: dict[str, Callable[[str, dict[str, torch.Tensor], float | None, str], Difference]] = {
    "lora_": _lora,
    "lokr_": _lokr,
    "hada_": _loha,
}


def scaled(one: Difference, factor: float) -> Difference:
    """`factor` times the difference.

    Where a file has no place for a scale (LoKr of two whole matrices) the smaller matrix takes it.
    """
    if factor == 1:
        return one
    if isinstance(one, LoKr) and one.alpha is None:
        return replace(one, w1=one.w1 * factor)
    assert isinstance(one, (Factors, LoKr, LoHa))
    return replace(one, scale=one.scale * factor)


def splits(whole: Difference) -> bool:
    """Has each third of the rows matrices, and lengths, of its own?"""
    rows = [tensor.shape[0] for key, tensor in whole.tensors.items() if key in BY_ROWS]
    return _one_length(whole) is None and all(count % 3 == 0 for count in rows)


def _one_length(whole: Difference) -> torch.Tensor | None:
    """A DoRA's lengths where all rows share them."""
    magnitude = whole.tensors.get("dora_scale")
    return magnitude if magnitude is not None and magnitude.shape[0] == 1 else None


def split_fused(name: str, whole: Difference, file: str) -> dict[str, Difference]:
    """A difference of the fused qkv as three, each with a third of the rows.

    Raises LoraFileError where that cannot be exact.
    """
    if _one_length(whole) is not None:
        raise LoraFileError(_one_length_for_three(file, name))
    if not splits(whole):
        raise LoraFileError(_not_split(file, name))
    by_rows = {*BY_ROWS, "dora_scale"}
    split = {key: tensor.chunk(3) if key in by_rows else [tensor] * 3 for key, tensor in whole.tensors.items()}
    return {
        third: whole.of({key: tensors[i] for key, tensors in split.items()}) for i, third in enumerate(thirds(name))
    }


def thirds(fused: str) -> list[str]:
    """to_q, to_k and to_v of a fused qkv."""
    return [f"{fused.removesuffix('qkv')}to_{letter}" for letter in "qkv"]


# What is said of a file. part: of the LoRA, by its name


def _numbers_not_finite(file: str, what: str) -> str:
    return (
        f"{file}: {what} holds numbers that are not finite. The training that made it has failed: use an earlier save."
    )


def _no_matrices(file: str, part: str, has: list[str]) -> str:
    return (
        f"{file} has only {', '.join(has)} of {part}: its matrices are missing, "
        "or of a kind that is not understood (LoRA, DoRA, LoKr and LoHa are)."
    )


def _too_large(file: str, part: str, shape: tuple[int, int]) -> str:
    return f"{file}: {part} would change a matrix of {shape[0]}x{shape[1]} numbers; no model has one so large."


def _one_length_for_three(file: str, part: str) -> str:
    return (
        f"{file}: {part} is a DoRA with one length for q, k and v together, which cannot be taken apart. "
        "Train it on to_q, to_k and to_v."
    )


def _not_split(file: str, part: str) -> str:
    return (
        f"{file}: {part} cannot be split into its three parts exactly. "
        "Give it a rank in Convert LoRA, which makes it a plain LoRA."
    )
