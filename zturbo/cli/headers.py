"""What a model's files say of its matrices, without loading them.

They have ComfyUI's names or diffusers', and are one file or a folder of them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import convert, lorafile, modelfile
from ..errors import ModelError
from ..lowrank import Target

FLOATS = ("F32", "F16", "BF16")  # safetensors' names


@dataclass(frozen=True)
class Matrix:
    """A Linear's weight in a file, and the LoRAs that live on it. dtype: safetensors' name."""

    file: Path
    key: str
    dtype: str
    target: Target


def matrices(path: Path) -> list[Matrix]:
    """Every matrix of a model. Raises ModelError when there is none."""
    found = []
    for file in files(path):
        with opened(file) as tensors:
            names = list(tensors.keys())
            own = [name for name in names if name.startswith(modelfile.MODEL)]  # a checkpoint holds other parts as well
            for key in sorted(own or names):
                piece = tensors.get_slice(key)
                if key.endswith(".weight") and len(piece.get_shape()) == 2:
                    out, width = piece.get_shape()
                    name = key.removeprefix(modelfile.MODEL).removesuffix(".weight")
                    found.append(Matrix(file, key, piece.get_dtype(), lorafile.module_targets(name, width, out)))
    if not found:
        raise ModelError(f"{path} holds no model's weights. Give Z-Image-Turbo, as z_image_turbo_bf16.safetensors.")
    return found


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def opened(file: Path) -> safe_open:
    modelfile.read(file)  # which says what is wrong with a file that is none
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({error}). Give the path of a whole file.") from error


def weights(path: Path) -> convert.Weights:
    """What `convert` asks of a model. Raises ModelError, or LoraFileError where the LoRA does not fit."""
    plain = [one for one in matrices(path) if one.dtype in FLOATS]
    if not plain:
        raise ModelError(_quantised(path))
    places = {part.name: (one, part) for one in plain for part in one.target.parts}

    def read(name: str) -> torch.Tensor:
        one, part = places[name]
        with opened(one.file) as tensors:
            return tensors.get_slice(one.key)[part.rows].float()

    def reader(lora, name: str):
        lorafile.check_fit(lora, [one.target for one in plain], name)
        return read

    return reader


def _quantised(path: Path) -> str:
    return (
        f"{path} holds no weights in bf16, fp16 or fp32. "
        "Give a model that is not quantised, as z_image_turbo_bf16.safetensors."
    )
