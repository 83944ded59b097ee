"""Weights that wait in main memory while nobody needs them, and go back to the file that they came from."""

import logging
from collections.abc import Iterator
from pathlib import Path

import comfy.utils
import torch
from comfy.cli_args import args
from safetensors import SafetensorError, safe_open

from ..memory import GB
from . import devices
from .comfy_mode import core_mode

FILED = "zturbo_on_file"
log = logging.getLogger("zturbo")


def to_file(patcher) -> int:
    """Let the weights of a model that waits in main memory lie in the file that they came from. Returns bytes.

    Only those that are its very numbers. The system reads them when they are used, and drops them when memory is short.
    """
    if not devices.shares_main_memory(patcher.load_device) or patcher.is_dynamic() or args.disable_mmap:
        return 0
    there, moved = stored(patcher), 0
    # name -> address, of those that lie there already
    filed: dict[str, int] = dict(patcher.get_attachment(FILED) or {})
    with core_mode():
        for name, tensor in list(patcher.model.named_parameters()):
            key = next((key for key in endings(name) if key in there), None)
            if key is None or type(tensor.data) is not torch.Tensor or filed.get(name) == tensor.data_ptr():
                continue
            kept = there[key].get_tensor(key)
            if kept.dtype == tensor.dtype and kept.shape == tensor.shape and torch.equal(kept, tensor):
                comfy.utils.set_attr_param(patcher.model, name, kept)
                filed[name] = kept.data_ptr()
                moved += tensor.nbytes
    patcher.set_attachments(FILED, filed)
    if moved > 0.05 * GB:
        log.info("%.1f GB of %s are read from their file when they are used.", moved / GB, type(patcher.model).__name__)
    return moved


def endings(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: a module has its weights under a longer name than its file."""
    parts = name.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def stored(patcher) -> dict[str, safe_open]:
    """Tensor name -> open file, of the safetensors files that core says a model is from."""
    factory = getattr(patcher, "cached_patcher_init", None)
    given = factory[1] if factory else ()
    flat = [one for value in given for one in (value if isinstance(value, (list, tuple)) else [value])]
    found = {}
    for path in flat:
        if not isinstance(path, (str, Path)):
            continue
        try:
            opened = safe_open(path, "pt")
        except (OSError, SafetensorError):
            continue
        found.update(dict.fromkeys(opened.keys(), opened))
    return found
