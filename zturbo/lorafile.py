"""LoRA files: the ecosystem's dialects in, one dialect out.

Inside the pack a LoRA is a dict from canonical name (`layers.0.attention.to_q`) to a `lowrank.Difference`. Out go
`diffusion_model.<name>.lora_A.weight` / `lora_B.weight` and, where the scale is not 1, `.alpha`: what core
ComfyUI, diffusers and the reference trainer all read. DoRA adds `.dora_scale`; LoKr and LoHa have LyCORIS's names.
"""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from . import files, loraforms, loranames, modelfile, peft_config, tensorfile
from .errors import LoraFileError, ModelError
from .lowrank import Difference, Part, Target

THUMBNAIL = 256  # pixels on the longer side
EMPTY = {"lora_A.weight", "lora_B.weight"}
HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class LoraState(dict[str, torch.Tensor]):
    """A LoRA file's tensors by key, as core's LORA_MODEL is, with the metadata that the file will have."""

    def __init__(self, state: dict[str, torch.Tensor], metadata: dict[str, str]):
        super().__init__(state)
        self.metadata = metadata


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: differences by canonical name, the file's own metadata, and the keys that were not understood."""

    factors: dict[str, Difference]
    metadata: dict[str, str]
    leftover: tuple[str, ...]
    sha256: str
    dialect: str = ""  # whose names it has
    notes: tuple[str, ...] = ()  # sentences on what had to be assumed
    beside: dict[str, torch.Tensor] = field(default_factory=dict)  # of the leftover, what core reads, by core's names

    @property
    def ranks(self) -> list[int]:
        return sorted({one.rank for one in self.factors.values()})

    @property
    def dtypes(self) -> list[str]:
        tensors = [tensor for one in self.factors.values() for tensor in one.tensors.values()]
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def module_targets(module: str, in_features: int, out_features: int) -> Target:
    """The LoRAs that live on one Linear of NextDiT, under the ecosystem's names."""
    if module.endswith("attention.qkv"):
        stem, third = module.removesuffix("qkv"), out_features // 3
        parts = tuple(Part(f"{stem}to_{letter}", i * third, third) for i, letter in enumerate("qkv"))
    else:
        parts = (Part(_part_name(module), 0, out_features),)
    return Target(module, in_features, out_features, parts)


def _part_name(module: str) -> str:
    if module.endswith("attention.out"):
        return module.removesuffix("attention.out") + "attention.to_out.0"
    return loranames.OUTSIDE.get(module, module)


def read(path: str | os.PathLike, keep_fused: bool = False) -> LoraFile:
    """Read a LoRA in any dialect. Raises LoraFileError, with the reason, for what is not a whole LoRA file.

    keep_fused: leave a fused qkv whole, under its own name, where its parts cannot be told apart exactly.
    """
    path = Path(path)
    raw, plain, tensors = _opened(path)
    metadata, names = tensorfile.header(plain).get("__metadata__") or {}, loranames.dialect(tensors)
    peft = loranames.is_peft(tensors)
    config = peft_config.find(path, metadata, peft)
    factors, leftover = parse(tensors, path.name, config, keep_fused)
    if not factors:
        raise LoraFileError(_no_lora(path.name, tensors))
    notes = [peft_config.MISSING] if config is None and peft else []
    if empty := empty_parts(tensors):
        notes.append(f"{len(empty)} parts of rank 0 are nothing and were left out (for example {empty[0]}).")
    notes += _doubts(tensors, factors, leftover, metadata)
    digest, beside = hashlib.sha256(raw).hexdigest(), _beside(tensors, leftover, path.name)
    return LoraFile(factors, metadata, tuple(leftover), digest, names, tuple(notes), beside)


def metadata(path: Path) -> dict[str, str]:
    """Of a file's header alone; nothing of one that cannot be read."""
    try:
        with safe_open(path, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _opened(path: Path) -> tuple[bytes, bytes, dict[str, torch.Tensor]]:
    """(content, the same as the library reads it, tensors) of a file. Raises LoraFileError where it is not whole."""
    try:
        if path.exists() and not path.is_file():
            raise LoraFileError(f"{path.name} is not a file. Choose a LoRA file.")
        raw = path.read_bytes()
    except OSError as error:
        raise LoraFileError(f"The LoRA file {path.name} cannot be opened: {error.strerror}.") from error
    try:
        modelfile.check(path, raw)
    except ModelError as error:
        raise LoraFileError(str(error)) from error
    try:
        plain = _plain(raw)
        return raw, plain, load(plain)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise LoraFileError(_not_whole(path.name, error)) from error


def _plain(raw: bytes) -> bytes:
    """A file whose metadata has numbers in it, with texts in their place; any other as it is.

    The library refuses numbers there.
    """
    header = tensorfile.header(raw)
    words = header.get("__metadata__")
    if not isinstance(words, dict) or all(isinstance(value, str) for value in words.values()):
        return raw
    for key, value in words.items():
        words[key] = value if isinstance(value, str) else json.dumps(value)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :]


def empty_parts(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The parts whose matrices have rank 0, as resizers and pruners leave them."""
    empty = [loranames.kind(key) for key, tensor in tensors.items() if not tensor.numel()]
    return sorted({name for kind, stem in empty if kind in EMPTY and (name := loranames.canonical(stem))})


def _doubts(
    tensors: Mapping[str, torch.Tensor], factors: dict[str, Difference], leftover: list[str], metadata: dict
) -> list[str]:
    """Where the strength that the header tells is not the one that the tensors tell."""
    if not any(one.scale for one in factors.values()) and not any(loranames.aside(key)[1] for key in leftover):
        return ["Every alpha is 0: this LoRA does nothing."]
    alphas = [key for key in tensors if loranames.kind(key)[0] == "alpha"]
    ranks = {one.rank for one in factors.values()}
    said = next((metadata[key] for key in HEADER_ALPHAS if key in metadata), "")
    try:
        alpha = float(said)
    except ValueError:
        return []
    if alphas or len(ranks) != 1 or not math.isfinite(alpha) or alpha in (0, rank := ranks.pop()):
        return []
    return [_scale_in_the_header(alpha, rank)]


def of_state(state: dict[str, torch.Tensor], file: str, keep_fused: bool = False) -> LoraFile:
    """A LORA_MODEL as if it had been read from a file."""
    factors, leftover = parse(state, file, keep_fused=keep_fused)
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(key.encode() + tensorfile.raw(tensor.cpu()).tobytes())
    metadata, beside = dict(getattr(state, "metadata", {})), _beside(state, leftover, file)
    names = loranames.dialect(state)
    return LoraFile(factors, metadata, tuple(leftover), digest.hexdigest(), names, beside=beside)


def _beside(tensors: Mapping[str, torch.Tensor], leftover: list[str], file: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key in leftover:
        name = loranames.aside(key)[1]
        if name and not _alike(found.setdefault(name, tensors[key]), tensors[key]):
            raise LoraFileError(_twice(file, name, "in two dialects, with different numbers"))
    return found


def _examples(keys) -> str:
    return ", ".join(sorted(keys)[:3])


def _known(keys) -> str:
    """A sentence on those of the keys that are something else than a LoRA of the diffusion model."""
    words = [word for key in keys if (word := loranames.aside(key)[0])]
    return f" Of these are {loranames.counted(words)}." if words else ""


def on_device(factors: dict[str, Difference], device) -> dict[str, Difference]:
    """In fp32."""
    return {
        name: one.of({key: tensor.float().to(device) for key, tensor in one.tensors.items()})
        for name, one in factors.items()
    }


def parse(
    tensors: dict[str, torch.Tensor], file: str = "the LoRA", config: dict | None = None, keep_fused: bool = False
) -> tuple[dict[str, Difference], list[str]]:
    """(differences by canonical name, keys that are none of these; `beside` says which of them core reads).

    config: PEFT's, which holds the scales that PEFT keeps out of the tensors. keep_fused: see `read`. Raises
    LoraFileError for parts that do not make one.
    """
    found, leftover = _sorted_out(tensors, file)
    differences: dict[str, Difference] = {}
    for name, parts in found.items():
        one = loraforms.difference(name, parts, file)
        if config is not None and "alpha" not in parts:
            one = loraforms.scaled(one, peft_config.scale(config, name, one.rank, file))
        is_fused = name.endswith("attention.qkv")
        if is_fused and (twice := found.keys() & loraforms.thirds(name)):
            raise LoraFileError(_twice(file, min(twice), "by itself and in the fused qkv"))
        if is_fused and (loraforms.splits(one) or not keep_fused):
            differences.update(loraforms.split_fused(name, one, file))
        else:
            differences[name] = one
    return differences, leftover


def _sorted_out(tensors: dict[str, torch.Tensor], file: str) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """(canonical name -> the tensors of a part by our names of them, keys that are none of these)."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    scales: dict[str, list[str]] = {}
    leftover = []
    for key, tensor in tensors.items():
        kind, stem = loranames.kind(key)
        name = loranames.canonical(stem) if stem else None
        if name is None:
            leftover.append(key)
            continue
        if kind in loraforms.SCALES:
            scales.setdefault(name, []).append(key)
        if not _alike(found.setdefault(name, {}).setdefault(kind, tensor), tensor):
            how = "in two dialects or of two adapters, with different numbers"
            raise LoraFileError(_twice(file, f"{kind} of {name}", how))
    for name in empty_parts(tensors):
        found.pop(name, None)
    others = {name for key in leftover if (name := loranames.changes(key))}
    for name in [name for name, parts in found.items() if name in others and parts.keys() <= loraforms.SCALES]:
        leftover += scales[name]  # of a form that is no LoRA
        del found[name]
    return found, leftover


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same numbers?"""
    return one is other or (one.shape == other.shape and torch.equal(one.double(), other.double()))


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A CPU copy with memory of its own: safetensors refuses shared memory, which the parts of a fused LoRA have."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())


def state_dict(differences: Mapping[str, Difference], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The one dialect out, on the CPU, in the given dtype.

    DoRA's lengths stay fp32: rounded, they would move the whole weight.
    """
    state = {}
    for name, one in sorted(differences.items()):
        for kind, tensor in one.tensors.items():
            state[f"diffusion_model.{name}.{kind}"] = _own(tensor, torch.float32 if kind == "dora_scale" else dtype)
        if one.alpha is not None:
            state[f"diffusion_model.{name}.alpha"] = torch.tensor(one.alpha, dtype=torch.float32)
    return state


def whole_state(
    file: LoraFile, dtype: torch.dtype, name: str, lossy: bool = False
) -> tuple[dict[str, torch.Tensor], str, str]:
    """(all of a LoRA on the CPU, what of it only core reads, what is left out), the last two counted in words.

    What our dialect has no place for is under core's names. lossy: what core does not read either may be left out where
    it is known, as a text encoder's parts. Raises LoraFileError for other keys.
    """
    words = {key: loranames.aside(key) for key in file.leftover}
    unknown = [key for key, (word, core) in words.items() if not (core or (lossy and word))]
    need_all({**file.factors, **file.beside}, unknown, name)
    kept = [loranames.aside(key)[0] for key in file.beside]
    kept += ["matrix of q, k and v together" for part in file.factors if part.endswith("attention.qkv")]
    state = state_dict(file.factors, dtype)
    for key, tensor in file.beside.items():
        state[key] = _own(tensor, dtype if tensor.is_floating_point() else tensor.dtype)
    return state, loranames.counted(kept), loranames.counted(word for word, core in words.values() if not core)


def write(path: str | os.PathLike, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Write atomically (`files.write`).

    Raises LoraFileError, naming the reason: the disk's, or a number that is none.
    """
    path = Path(path)
    if broken := loraforms.not_finite(state):
        raise LoraFileError(_not_written(broken, state[broken].dtype))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, tensorfile.pieces(state, {"format": "pt", **metadata}))
    except OSError as error:
        raise LoraFileError(f"The LoRA cannot be written to {path}: {error.strerror}. {files.advice(error)}") from error
    return path


def thumbnail(images: list[np.ndarray]) -> dict[str, str]:
    """The first picture [H, W, 3] uint8, small, as the metadata field that model browsers show (SAI modelspec 1.0.0).

    Nothing where there is none.
    """
    if not images:
        return {}
    picture, content = Image.fromarray(images[0]), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(content, format="JPEG", quality=85)
    return {"modelspec.thumbnail": "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()}


def check_fit(factors: Mapping[str, Difference], targets: list[Target], file: str):
    """Raise LoraFileError, with counts and examples, unless every factor has a place of its shape in the model."""
    places = {part.name: (part.size, target.in_features) for target in targets for part in target.parts}
    unknown = [name for name in factors if name not in places]
    wrong = [name for name in factors if name in places and factors[name].shape != places[name]]
    if not unknown and not wrong:
        return
    fitting = len(factors) - len(unknown) - len(wrong)
    lines = [f"{file} does not fit this model: {fitting} of its {len(factors)} matrices do."]
    if unknown:
        lines.append(f"{len(unknown)} have no place in it (for example {_examples(unknown)}).")
    if wrong:
        (out, width), (wanted_out, wanted_width) = factors[wrong[0]].shape, places[wrong[0]]
        sizes = f"{width} in, {out} out; the model has {wanted_width} in, {wanted_out} out"
        lines.append(f"{len(wrong)} have another size (for example {wrong[0]}: {sizes}).")
    raise LoraFileError(" ".join(lines) + " Choose a file that was made for this model.")


def need_all(factors: Mapping, leftover: list[str], file: str):
    """Raise LoraFileError when something of a LoRA would be lost by writing only what was understood."""
    if not factors or leftover:
        counts = f"{len(factors)} matrices are understood, {len(leftover)} keys are not"
        examples = f"(for example {_examples(leftover)}).{_known(leftover)}"
        raise LoraFileError(f"{file} is not a LoRA for Z-Image: {counts} {examples}")


def from_state(state: Mapping[str, torch.Tensor], file: str = "the LoRA") -> dict[str, Difference]:
    """What `state_dict` wrote, to the bit, of any model family. Raises LoraFileError where parts do not make one."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        kind, stem = loranames.kind(key)
        if kind:
            found.setdefault(stem.removeprefix("diffusion_model."), {})[kind] = tensor
    return {name: loraforms.difference(name, parts, file) for name, parts in found.items()}


def read_own(path: Path) -> dict[str, Difference]:
    """The LoRA in a file that this pack wrote, of any model family. Raises LoraFileError for one that holds none."""
    tensors = _opened(path)[2]
    found = from_state(tensors, path.name)
    if not found:
        raise LoraFileError(_no_lora(path.name, tensors))
    return found


# What is said of a file


def _not_whole(file: str, error: Exception) -> str:
    return f"{file} is not a whole safetensors file ({error}). It may be cut off: download or copy it again."


def _no_lora(file: str, keys) -> str:
    none = f"none of its {len(keys)} keys is one (for example {_examples(keys)})"
    return f"{file} holds no LoRA for Z-Image: {none}.{_known(keys)}"


def _scale_in_the_header(alpha: float, rank: int) -> str:
    return (
        f"The header says alpha {alpha:g} at rank {rank}, and the tensors hold no scale: it is read at full strength, "
        f"as core reads it. If it is too strong, draw with it at {alpha / rank:.3g}."
    )


def _twice(file: str, what: str, how: str) -> str:
    return f"{file} holds {what} twice, {how}. Keep one of them."


def _not_written(key: str, dtype: torch.dtype) -> str:
    return (
        f"The LoRA is not written: {key} has numbers that are not finite, or too large for {dtype}. "
        "Choose bf16 or fp32, or an earlier save."
    )
