"""Files of the real model's names and sizes that take no room: a safetensors header, and holes in place of weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
BLOCKS = ("layers.", "noise_refiner.", "context_refiner.", "model.layers.")
PREFIX = "model.diffusion_model."
CANARY = torch.arange(1, 129) / 128  # exact in bf16 and fp16


@dataclass(frozen=True)
class Hole:
    """A tensor of zeros that is not on the disk, but for what stands at its start."""

    dtype: str
    shape: tuple[int, ...]
    start: bytes = b""

    def size(self) -> int:
        return BYTES[self.dtype] * torch.Size(self.shape).numel()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(tensor: torch.Tensor) -> Hole:
    return Hole(NAMES[tensor.dtype], tuple(tensor.shape), raw(tensor))


def write(path: Path, tensors: dict[str, Hole], words: dict[str, str] | None = None) -> Path:
    """In safetensors' own order, widest numbers first: out of line with their width they would be copied when read."""
    tensors = dict(sorted(tensors.items(), key=lambda item: (-BYTES[item[1].dtype], item[0])))
    header, at = {"__metadata__": words} if words else {}, 0
    for name, hole in tensors.items():
        header[name] = {"dtype": hole.dtype, "shape": list(hole.shape), "data_offsets": [at, at + hole.size()]}
        at += hole.size()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, hole in tensors.items():
            if hole.start:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(hole.start)
        file.truncate(8 + len(text) + at)
    return path


def holes(module: torch.nn.Module, dtype: str) -> dict[str, Hole]:
    """A module's names and shapes, in one dtype."""
    return {name: Hole(dtype, tuple(tensor.shape)) for name, tensor in module.state_dict().items()}


def behind(prefix: str, tensors: dict[str, Hole]) -> dict[str, Hole]:
    return {prefix + name: hole for name, hole in tensors.items()}


# Quantised forms: every matrix of the blocks


def matrices(tensors: dict[str, Hole]) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, hole in tensors.items()
        if name.startswith(BLOCKS) and name.endswith(".weight") and len(hole.shape) == 2
    ]


def scaled_fp8(tensors: dict[str, Hole], marker: str = "scaled_fp8") -> dict[str, Hole]:
    """The older form: a marker, and a scale_weight beside each matrix."""
    found = {marker: Hole("F8_E4M3", (2,))} | tensors
    for name in matrices(tensors):
        found[f"{name}.weight"] = Hole("F8_E4M3", tensors[f"{name}.weight"].shape)
        found[f"{name}.scale_weight"] = filled(torch.tensor([0.5]))
    return found


def parts(kind: str, shape: tuple[int, int]) -> dict[str, Hole]:
    """What core's formats keep for a matrix of this shape (comfy/quant_ops.py)."""
    out, width = shape
    one = filled(torch.tensor(0.5))
    return {
        "float8_e4m3fn": {"weight": Hole("F8_E4M3", shape), "weight_scale": one},
        "float8_e5m2": {"weight": Hole("F8_E5M2", shape), "weight_scale": one},
        "int8_tensorwise": {"weight": Hole("I8", shape), "weight_scale": one},
        "int8_rows": {"weight": Hole("I8", shape), "weight_scale": Hole("F32", (out, 1))},
        "mxfp8": {"weight": Hole("F8_E4M3", shape), "weight_scale": Hole("U8", (out, width // 32))},
        "nvfp4": {
            "weight": Hole("U8", (out, width // 2)),
            "weight_scale": Hole("F8_E4M3", (out, width // 16)),
            "weight_scale_2": one,
        },
        "convrot_w4a4": {"weight": Hole("I8", (out, width // 2)), "weight_scale": Hole("F32", (out,))},
    }[kind]


def quantised(tensors: dict[str, Hole], kind: str, said: dict | None = None) -> dict[str, Hole]:
    """Core's own form: a comfy_quant beside each matrix says what it is."""
    found = dict(tensors)
    note = filled(torch.tensor(list(json.dumps(said or {"format": kind}).encode()), dtype=torch.uint8))
    for name in matrices(tensors):
        made = parts(kind, tensors[f"{name}.weight"].shape)
        found |= {f"{name}.{part}": hole for part, hole in made.items()} | {f"{name}.comfy_quant": note}
    return found


def said_in_header(tensors: dict[str, Hole], kind: str) -> tuple[dict[str, Hole], dict[str, str]]:
    """The same, said once in the header's words instead."""
    found = {name: hole for name, hole in quantised(tensors, kind).items() if not name.endswith("comfy_quant")}
    layers = {name: {"format": kind} for name in matrices(tensors)}
    return found, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
