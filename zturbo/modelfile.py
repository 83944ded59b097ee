"""A model's or LoRA's file before its weights are read: is it a whole safetensors file, and what does its header say?

Downloads go wrong in a few known ways, and the loaders' own errors name none of them.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError

MODEL = "model.diffusion_model."  # in front of the diffusion model's names where a file holds more than it
SUFFIXES = (".safetensors", ".sft")
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # by their protocols
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
AGAIN = "Download it again, from the button or link that says download."
# what a file is that is none, and what to do; behind its name
GGUF = (
    "is a GGUF file. Load it with the ComfyUI-GGUF pack's own nodes, Unet Loader (GGUF) or CLIPLoader (GGUF), "
    "and wire their MODEL or CLIP in place of this node's."
)
OTHER = "is no safetensors file; other kinds can hold programs. Choose a file that ends in .safetensors."
EMPTY = f"is empty. {AGAIN}"
POINTER = (
    "is a Git LFS pointer: {size} bytes of text that stand for the file, as git leaves them where Git LFS is not "
    "installed. Run git lfs pull there, or download it by itself."
)
WEB_PAGE = (
    "is a web page, saved under this name: the link led to a page (a login, an error, the file's description), "
    f"not to the file. {AGAIN}"
)
ARCHIVE = (
    "is a ZIP archive under the name of a safetensors file. Unpack it, and choose the .safetensors file that is in it."
)
PICKLE = (
    "is a PyTorch file under the name of a safetensors file; such files can hold programs. "
    "Choose a real .safetensors file."
)
OTHER_START = f"cannot be read: it does not begin as a safetensors file does. {AGAIN}"
CUT_IN_HEADER = f"cannot be read: it is cut off within its header. {AGAIN}"


@dataclass(frozen=True)
class Tensor:
    """dtype: safetensors' name, as BF16."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Of a safetensors file. words: what it says of itself."""

    path: Path
    tensors: dict[str, Tensor]
    words: dict[str, str]

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)


def read(path: str | Path) -> Header:
    """The header of a whole safetensors file; no weight is read. Raises ModelError, saying what else it is."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelError(f"There is no file {path}. Give the path of a whole file.")
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
            _refuse_other_kinds(path, start, size)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            raw = file.read(length)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read ({error}). Check the disk and the file.") from error
    return _parsed(path, raw, size)


def check(path: Path, raw: bytes):
    """As `read`, of a file that was read as a whole. Raises ModelError, saying what else it is."""
    _refuse_other_kinds(path, raw[:512], len(raw))
    _parsed(path, raw[8 : 8 + int.from_bytes(raw[:8], "little")], len(raw))


def part_of_several(path: Path) -> str:
    """`1 of 3` for `…-00001-of-00003.safetensors`, else nothing."""
    found = re.search(r"-0*(\d+)-of-0*(\d+)\.", path.name)
    return f"{found[1]} of {found[2]}" if found else ""


def _refuse_other_kinds(path: Path, start: bytes, size: int):
    if wrong := _other_kind(path.suffix.lower(), start, size) or _no_header(start, size):
        raise ModelError(f"{path.name} {wrong}")


def _other_kind(suffix: str, start: bytes, size: int) -> str:
    """What a file is by its name and its first bytes, where that is no safetensors file; else nothing."""
    first = start.lstrip()[:100].lower()
    zipped = start.startswith(b"PK\x03\x04")
    if start.startswith(b"GGUF") or suffix == ".gguf":
        return GGUF
    if suffix not in SUFFIXES:
        return OTHER
    if not start:
        return EMPTY
    if start.startswith(b"version https://git-lfs"):
        return POINTER.format(size=size)
    if first.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return WEB_PAGE
    if (zipped or start.startswith(PICKLES)) and start[8:9] != b"{":  # a header's length may begin alike
        return ARCHIVE if zipped and b"/data.pkl" not in start else PICKLE
    return ""


def _no_header(start: bytes, size: int) -> str:
    """What is wrong with the beginning of a safetensors file, or nothing."""
    if size < 2000 and (said := _text(start)):
        return f"holds no weights, but the words {said!r}. {AGAIN}"
    length = int.from_bytes(start[:8], "little")
    if length > LONGEST_HEADER:
        return OTHER_START
    return CUT_IN_HEADER if size < 8 or 8 + length > size else ""


def _text(start: bytes) -> str:
    """What a server answered in place of the file, when it is a text."""
    try:
        text = start.decode("utf-8").strip()
    except UnicodeDecodeError:
        return ""
    return text[:100] if text.replace("\n", " ").replace("\r", " ").isprintable() else ""


def _parsed(path: Path, raw: bytes, size: int) -> Header:
    try:
        header = json.loads(raw)
        words = header.pop("__metadata__", None) or {}
        ends = [0, *(int(entry["data_offsets"][1]) for entry in header.values())]
        tensors = {name: Tensor(str(one["dtype"]), tuple(map(int, one["shape"]))) for name, one in header.items()}
        words = {str(key): str(value) for key, value in words.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise ModelError(f"{path.name} cannot be read: its header is damaged ({error!r}). {AGAIN}") from error
    if any(number < 0 or number > 2**40 for tensor in tensors.values() for number in tensor.shape):
        raise ModelError(f"{path.name} cannot be read: its header names a tensor of no possible shape. {AGAIN}")
    whole = 8 + len(raw) + max(ends)
    if size < whole:
        raise ModelError(f"{path.name} is cut off: it has {_bytes(size)} of {_bytes(whole)}. {AGAIN}")
    return Header(path, tensors, words)


def _bytes(number: int) -> str:
    """`11.46 GB`, with as many digits as tell two sizes of one file apart."""
    if number < 10_000:
        return f"{number} bytes"
    power = min(3, int(math.log10(number)) // 3)
    return f"{number / 1000**power:.2f} {('bytes', 'kB', 'MB', 'GB')[power]}"
