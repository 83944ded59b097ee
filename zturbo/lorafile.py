"""LoRA files: the ecosystem's dialects in, one dialect out.

Inside the pack a LoRA is a dict from canonical name (`layers.0.attention.to_q`) to `Factors`. Out go
`diffusion_model.<name>.lora_A.weight` / `lora_B.weight` and, where the scale is not 1, `.alpha`: what core
ComfyUI, diffusers and the reference trainer all read.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from . import files
from .errors import LoraFileError
from .lowrank import Factors, Part, Target

PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
DOWN = (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".lora.down.weight")
UP = (".lora_B.weight", ".lora_up.weight", ".lora_B.default.weight", ".lora.up.weight")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK_LEAVES = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "attention.qkv", "attention.out",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
)  # fmt: skip


class LoraState(dict[str, torch.Tensor]):
    """A LoRA file's tensors by key, as core's LORA_MODEL is, with the metadata that the file will have."""

    def __init__(self, state: dict[str, torch.Tensor], metadata: dict[str, str]):
        super().__init__(state)
        self.metadata = metadata


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: factors by canonical name, the file's own metadata, and the keys that were not understood."""

    factors: dict[str, Factors]
    metadata: dict[str, str]
    leftover: tuple[str, ...]
    sha256: str

    @property
    def ranks(self) -> list[int]:
        return sorted({factors.rank for factors in self.factors.values()})

    @property
    def dtypes(self) -> list[str]:
        return sorted({str(factors.A.dtype).removeprefix("torch.") for factors in self.factors.values()})


def module_targets(module: str, in_features: int, out_features: int) -> Target:
    """The LoRAs that live on one Linear of NextDiT, under the ecosystem's names."""
    if module.endswith("attention.qkv"):
        stem, third = module.removesuffix("qkv"), out_features // 3
        parts = tuple(Part(f"{stem}to_{letter}", i * third, third) for i, letter in enumerate("qkv"))
    else:
        name = module.removesuffix("attention.out") + "attention.to_out.0" if module.endswith("attention.out") else module
        parts = (Part(name, 0, out_features),)
    return Target(module, in_features, out_features, parts)


def read(path: str | os.PathLike) -> LoraFile:
    """Read a LoRA in any dialect. Raises LoraFileError, with the reason, for what is not a whole LoRA file."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LoraFileError(f"The LoRA file {path.name} cannot be opened: {error.strerror}.") from error
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise LoraFileError(f"{path.name} is not a whole safetensors file ({error}). It may be cut off: download or copy it again.") from error
    factors, leftover = parse(tensors, path.name)
    if not factors:
        raise LoraFileError(f"{path.name} holds no LoRA for Z-Image: none of its {len(tensors)} keys is one (for example {_examples(tensors)}).")
    return LoraFile(factors, _metadata(raw), tuple(leftover), hashlib.sha256(raw).hexdigest())


def _metadata(raw: bytes) -> dict[str, str]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]).get("__metadata__", {})


def _examples(keys) -> str:
    return ", ".join(sorted(keys)[:3])


def parse(tensors: dict[str, torch.Tensor], file: str = "the LoRA") -> tuple[dict[str, Factors], list[str]]:
    """(factors by canonical name, keys not understood). Raises LoraFileError for a pair that is not one."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    leftover = []
    for key, tensor in tensors.items():
        side, stem = _side(key)
        name = canonical(stem) if stem else None
        if name is None:
            leftover.append(key)
        else:
            pairs.setdefault(name, {})[side] = tensor
    factors: dict[str, Factors] = {}
    for name, pair in pairs.items():
        if "down" not in pair or "up" not in pair:
            raise LoraFileError(f"{file} has only one half of {name} ({', '.join(pair)}): a LoRA needs a down and an up matrix.")
        A, B = pair["down"], pair["up"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not A.is_floating_point() or not B.is_floating_point():
            raise LoraFileError(f"{file}: the matrices of {name} do not fit each other: {tuple(A.shape)} and {tuple(B.shape)}.")
        scale = pair["alpha"].item() / A.shape[0] if "alpha" in pair else 1.0
        factors.update(_split_fused(name, Factors(A, B, scale)))
    return factors, leftover


def _side(key: str) -> tuple[str, str]:
    for side, endings in (("down", DOWN), ("up", UP), ("alpha", (".alpha",))):
        for ending in endings:
            if key.endswith(ending):
                return side, key.removesuffix(ending)
    return "", ""


def canonical(stem: str) -> str | None:
    """`lora_unet_layers_0_attention_to_q`, `transformer.layers.0.attention.to_q`, … -> `layers.0.attention.to_q`."""
    for prefix in PREFIXES:
        if stem.startswith(prefix):
            stem = stem.removeprefix(prefix)
            break
    for prefix in FLAT_PREFIXES:
        if stem.startswith(prefix):
            return _unflatten(stem.removeprefix(prefix))
    match = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)", stem)
    return _leaf(*match.groups()) if match else None


def _unflatten(flat: str) -> str | None:
    match = re.fullmatch(r"(layers|noise_refiner|context_refiner)_(\d+)_(.+)", flat)
    if not match:
        return None
    block, number, rest = match.groups()
    leaves = {leaf.replace(".", "_"): leaf for leaf in BLOCK_LEAVES}
    return _leaf(f"{block}.{number}", leaves[rest]) if rest in leaves else None


def _leaf(block: str, leaf: str) -> str | None:
    if leaf not in BLOCK_LEAVES:
        return None
    return f"{block}.{'attention.to_out.0' if leaf == 'attention.out' else leaf}"


def _split_fused(name: str, factors: Factors) -> dict[str, Factors]:
    """A LoRA on the fused qkv is three with the same A. Others pass through."""
    if not name.endswith("attention.qkv"):
        return {name: factors}
    stem = name.removesuffix("qkv")
    return {f"{stem}to_{letter}": Factors(factors.A, B, factors.scale) for letter, B in zip("qkv", factors.B.chunk(3))}


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A CPU copy with memory of its own: safetensors refuses shared memory, which the parts of a fused LoRA have."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())


def state_dict(factors: dict[str, Factors], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The one dialect out, on the CPU, in the given dtype."""
    state = {}
    for name, f in sorted(factors.items()):
        state[f"diffusion_model.{name}.lora_A.weight"] = _own(f.A, dtype)
        state[f"diffusion_model.{name}.lora_B.weight"] = _own(f.B, dtype)
        if f.scale != 1.0:
            state[f"diffusion_model.{name}.alpha"] = torch.tensor(f.scale * f.rank, dtype=torch.float32)
    return state


def write(path: str | os.PathLike, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write atomically (`files.write`). Raises LoraFileError naming the reason."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, save(state, {"format": "pt", **metadata}))
    except OSError as error:
        raise LoraFileError(f"The LoRA cannot be written to {path}: {error.strerror}. Free some room or choose a folder that can be written.") from error
    return path


def check_fit(factors: dict[str, Factors], targets: list[Target], file: str):
    """Raise LoraFileError, with counts and examples, unless every factor has a place of its shape in the model."""
    places = {part.name: (target.in_features, part.size) for target in targets for part in target.parts}
    unknown = [name for name in factors if name not in places]
    wrong = [name for name in factors if name in places and (factors[name].A.shape[1], factors[name].B.shape[0]) != places[name]]
    if not unknown and not wrong:
        return
    lines = [f"{file} does not fit this model: {len(factors) - len(unknown) - len(wrong)} of its {len(factors)} matrices do."]
    if unknown:
        lines.append(f"{len(unknown)} have no place in it (for example {_examples(unknown)}).")
    if wrong:
        given, wanted = factors[wrong[0]], places[wrong[0]]
        lines.append(f"{len(wrong)} have another size (for example {wrong[0]}: {given.A.shape[1]} in, {given.B.shape[0]} out; the model has {wanted[0]} in, {wanted[1]} out).")
    raise LoraFileError(" ".join(lines) + " Choose a file that was made for this model.")


def need_all(factors: dict[str, Factors], leftover: list[str], file: str):
    """Raise LoraFileError when something of a LoRA would be lost by writing only what was understood."""
    if not factors or leftover:
        raise LoraFileError(f"{file} is not a LoRA for Z-Image: {len(factors)} matrices are understood, {len(leftover)} keys are not (for example {_examples(leftover)}).")
