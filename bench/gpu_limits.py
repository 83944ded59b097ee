"""Parts on how little is enough, and where the time goes: the same step with little memory, and a profile of one."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import comfy.model_management
import torch
from torch.profiler import ProfilerActivity, profile

from bench import gpu_speed
from bench.gpu_place import GB, Place

LIMITS = (8, 12, 16, 24)  # GB
LAUNCHES = re.compile(r"(cuda|cu)LaunchKernel")
WAITS = re.compile(r"Synchronize|^aten::(item|_local_scalar_dense|nonzero)$|Memcpy DtoH")


@contextmanager
def only(place: Place, gigabytes: int):
    """All but so much of the card held by a block of no use. Weights under dynamic VRAM are not in PyTorch's allocator,
    so a limit on that alone would be none. What CUDA itself needs comes out of what is left, as on a real card."""
    place.sweep()
    size = int(total(place) - gigabytes * GB) if place.card else 0
    block = torch.empty(size, dtype=torch.uint8, device=place.device)
    place.held = size / GB
    try:
        yield
    finally:
        place.held = 0.0
        del block
        place.sweep()


def total(place: Place) -> int:
    """Bytes of the card."""
    return torch.cuda.mem_get_info(place.device)[1]


def limits(place: Place):
    """Does a step with AdamW train when so much of the card is left, and how fast? With checkpointing."""
    if not place.card:
        place.note("limited", "no card here: the same steps without a limit")
    for gigabytes in (one for one in LIMITS if place.card or one == LIMITS[0]):
        if place.card and total(place) < gigabytes * GB:
            place.note(f"{gigabytes}gb", "skipped: the card has less")
            continue
        for dtype in ("fp8", "bf16"):
            for side in (place.sides[-1], place.sides[0])[: len(place.sides)]:
                for way in ways(place, dtype, gigabytes):
                    key = f"{gigabytes}gb.{dtype}.{side}.{way}"
                    if place.left(4 if place.card else 1, key):
                        limited(place, key, gigabytes, dtype, way, side)


def ways(place: Place, dtype: str, gigabytes: int) -> tuple[str, ...]:
    """Branch, as the pack picks by itself for weights that do not fit or are quantised; merged too where it would."""
    size = place.model(dtype).model_size() / GB
    return ("branch", "merged") if dtype == "bf16" and 1.25 * size < gigabytes else ("branch",)


def limited(place: Place, key: str, gigabytes: int, dtype: str, way: str, side: int):
    """A fact. Memory that runs out is an answer, not a failure; anything else is one."""
    with place.attempt(key):
        try:
            with only(place, gigabytes):
                gpu_speed.one(place, key, dtype, way, True, side, optimizer=True)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            place.note(key, {"trains": False, "said": f"{type(error).__name__}: {str(error)[:300]}"})
    place.sweep()


def profiles(place: Place):
    """One step merged, with checkpointing, at the largest and the smallest side."""
    for side in sorted({place.sides[-1], place.sides[0]}, reverse=True):
        if place.left(3 if place.card else 1, str(side)):
            with place.attempt(str(side)), gpu_speed.ours(place, "bf16", "merged", True) as step:
                look(place, partial(step, side), side)
            place.sweep()


def look(place: Place, step: Callable[[], None], side: int):
    for _ in range(gpu_speed.WARM):
        place.seconds(step)
    place.note(f"{side}.costs", costs(place, step))
    place.note(f"{side}.waits_in", waits(place, step))


def costs(place: Place, step: Callable[[], None]) -> dict:
    """The ten largest in ms, with how often; kernels launched; every wait of the processor for the card."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.card else [])]
    with profile(activities=kinds) as watched:
        seconds = place.seconds(step)
    rows = watched.key_averages()
    took = (lambda row: row.self_device_time_total) if place.card else (lambda row: row.self_cpu_time_total)
    most = sorted(rows, key=took, reverse=True)[:10]
    return {
        "step_s": round(seconds, 4),
        "largest": [{"name": row.key[:100], "ms": round(took(row) / 1e3, 2), "count": row.count} for row in most],
        "all_ms": round(sum(took(row) for row in rows) / 1e3, 1),
        "kernel_launches": sum(row.count for row in rows if LAUNCHES.search(row.key)),
        "waits": {row.key: row.count for row in rows if WAITS.search(row.key)},
        "copies": {row.key: row.count for row in rows if "emcpy" in row.key or row.key == "aten::_to_copy"},
    }


def waits(place: Place, step: Callable[[], None]) -> dict[str, int]:
    """The lines of Python from which a step waits for the card, by PyTorch's own account, with how often."""
    if not place.card:
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message))
    return dict(lines.most_common(20))
