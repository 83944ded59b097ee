"""What differs from one kind of device to the next: dtypes, repeatable kernels, memory.

The kinds are NVIDIA, ROCm, XPU, MPS, DirectML, CPU.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.utils.deterministic

from ..errors import ZTurboError

REFUSED = ("does not have a deterministic implementation", "Deterministic behavior was enabled")  # PyTorch's words
COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}

# cuBLAS reads it when it is first used and repeats itself only with it; ComfyUI's --deterministic sets the same
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def kind(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return "ROCm card" if torch.version.hip else "NVIDIA card"
    words = {"cpu": "CPU", "mps": "Apple GPU (MPS)", "xpu": "Intel card (XPU)", "privateuseone": "DirectML card"}
    return words.get(device.type, device.type)


def has_bf16(device: torch.device) -> bool:
    """Does the device itself compute in bf16?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported()
    if device.type == "mps":
        return int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    if device.type == "cpu":  # without the instructions a product of matrices takes a hundred times as long as in fp32
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "privateuseone"


def compute_dtype(wish: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(what a step is computed in, a sentence where that is not the wish).

    fp16 is no way out: Z-Image's activations leave its range.
    """
    if wish == "bf16" and not has_bf16(device):
        return torch.float32, _no_bf16(device)
    return COMPUTE[wish], ""


def promise(device: torch.device, repeat: str) -> str:
    """What a run is told of getting the same bits again, after a resume or a second time."""
    if device.type == "cpu":
        return "Repeatable to the bit on this CPU."
    if repeat == "fast":
        return "Not repeatable to the bit (repeat is fast)."
    if device.type == "cuda" and not torch.version.hip:
        return f"Repeatable to the bit on this {kind(device)} (repeat is exact)."
    return f"Repeatable kernels are asked for (repeat is exact), but no {kind(device)} promises the same bits."


@contextmanager
def repeatable(device: torch.device, repeat: str) -> Iterator[None]:
    """With "exact", kernels that give the same bits each time, attention's backward among them.

    A CPU's do without asking. Raises ZTurboError for an operation that has no such kernel.
    """
    if device.type == "cpu" or repeat == "fast":
        yield
        return
    memory: Any = torch.utils.deterministic
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = torch.are_deterministic_algorithms_enabled(), warn_only, memory.fill_uninitialized_memory
    # with warn_only flash attention takes its backward that is not repeatable; off CUDA there is no such choice
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda" or not any(word in str(error) for word in REFUSED):
            raise
        raise ZTurboError(_not_repeatable(device, error)) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before[2]


def shares_main_memory(device: torch.device) -> bool:
    """Does the device compute in main memory, so that what is offloaded still takes room?"""
    return device.type in ("cpu", "mps")


def total_memory(device: torch.device) -> int:
    """Bytes that the device has in all; main memory's where it has none of its own, or does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "xpu":  # mem_get_info raises on integrated ones
        return torch.xpu.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def begin_counting(device: torch.device):
    """From now on PyTorch's own peak is this run's."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).reset_peak_memory_stats(device)


def begin_peak(device: torch.device) -> float | None:
    """Bytes that are allocated now, on a device whose allocator counts its peak from here."""
    if device.type not in ("cuda", "xpu"):
        return None
    begin_counting(device)
    return getattr(torch, device.type).memory_allocated(device)


def peak(device: torch.device) -> float:
    """Bytes allocated at once since `begin_peak`."""
    return getattr(torch, device.type).max_memory_allocated(device)


def memory_facts(device: torch.device) -> dict[str, float]:
    """GB in use where the model runs.

    memory: of the whole card, with other programs and with weights that PyTorch does not count; on a CPU, and where a
    card does not tell, of this process. memory_torch: PyTorch's own peak.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts = {"memory": total - free, "memory_torch": torch.cuda.max_memory_allocated(device)}
    elif device.type == "xpu":
        peak = torch.xpu.max_memory_allocated(device)
        facts = {"memory": torch.xpu.memory_reserved(device), "memory_torch": peak}
    elif device.type == "mps":
        facts = {"memory": torch.mps.driver_allocated_memory()}
    else:
        facts = {"memory": psutil.Process().memory_info().rss}
    return {name: round(count / 1e9, 3) for name, count in facts.items()}


# What is said of a device


def _no_bf16(device: torch.device) -> str:
    return (
        f"This {kind(device)} does not compute in bf16 itself, so a step is computed in fp32: "
        "its activations take twice the memory."
    )


def _not_repeatable(device: torch.device, error: Exception) -> str:
    said = str(error).splitlines()[0][:300]
    return (
        f"repeat is exact, but an operation has no repeatable kernel on this {kind(device)} ({said}). "
        "Set repeat to fast."
    )
