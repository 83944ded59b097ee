"""Is there room for a run? What it needs in all, against what the device or main memory has.

That is said before anything is done.
"""

import logging

import psutil
import torch

from ..errors import ZTurboError
from ..memory import GB, Need, spelled, total
from . import devices

log = logging.getLogger("zturbo")
ASIDE = 0.5 * GB  # for the system, and for what else goes on
WAYS = "Take an fp8 or int8 file of the model, a lower resolution, or a lower rank."
KEPT = "gradient_checkpointing on, with keep_layers at -1, needs least."
SMALLER = (
    "Make the previews smaller (preview_width, preview_height), "
    "or leave preview_prompts empty and draw when the run has ended."
)
PARTLY = "About %.1f of the model's %.1f GB stay on the card, beside %s; the rest comes and goes, which takes time."


def _no_main_memory(needs: list[Need], free: float, way: str) -> str:
    return (
        f"This run needs {spelled(needs)} of main memory beside the weights, and {free / GB:.1f} GB are free. "
        f"Close other programs. {way}"
    )


def _no_card(needs: list[Need], device: torch.device, has: float) -> str:
    card = f"the {devices.kind(device)} beside the weights, which has {has / GB:.1f} GB"
    return f"This run needs {spelled(needs)} on {card}. {WAYS}"


def _not_together(needs: list[Need], device: torch.device, free: float) -> str:
    return (
        f"On a computer whose {devices.kind(device)} computes in main memory these lie there together: "
        f"{spelled(needs)}, and {free / GB:.1f} GB are free. "
        "Close other programs, or choose smaller files: an fp8 or int8 model, an fp8 text encoder."
    )


def check(device: torch.device, step: list[Need], preview: list[Need], weights: float):
    """Raise ZTurboError where the largest moment of a run cannot fit beside the weights.

    step, preview: what each needs; they are not there at the same time. weights: bytes of the model, which are in main
    memory already on a CPU, and come and go on a card.
    """
    if devices.shares_main_memory(device):
        here = main_memory()
        for needs, way in ((step, f"{WAYS} {KEPT}"), (preview, SMALLER)):
            if total(needs) > here:
                raise ZTurboError(_no_main_memory(needs, here, way))
        return
    there = devices.total_memory(device) - ASIDE
    if total(step) > there:
        raise ZTurboError(_no_card(step, device, there))
    if total(step) + weights > there:
        stay = max(0.0, there - total(step))
        log.info(PARTLY, stay / GB, weights / GB, spelled(step))


def main_memory() -> float:
    """Bytes that are free and may be used."""
    return psutil.virtual_memory().available - ASIDE


def fits_main_memory(needs: list[Need]) -> bool:
    return total(needs) <= main_memory()


def check_files(device: torch.device, needs: list[Need]):
    """Raise ZTurboError where files that are about to be loaded into main memory cannot lie there together.

    On a card they need not. needs: what each takes there.
    """
    if devices.shares_main_memory(device) and not fits_main_memory(needs):
        raise ZTurboError(_not_together(needs, device, main_memory()))
