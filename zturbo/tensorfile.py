"""Safetensors files written piece by piece: the same bytes each time, and nothing as large as the file in memory.

The library writes a header's words in any order and builds the file twice over in memory; beside a model that
fills it, that is a checkpoint too many. Reading is the library's.
"""

import json
from collections.abc import Iterator

import torch

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def pieces(tensors: dict[str, torch.Tensor], words: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The file: its header, then each tensor's bytes, those with the widest numbers first.

    tensors: on the CPU; words: its metadata.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict] = {"__metadata__": dict(sorted(words.items()))} if words else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield raw(tensors[name])


def raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header(content: bytes) -> dict:
    """The header of a whole safetensors file: tensors by name, and its words under `__metadata__`."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
