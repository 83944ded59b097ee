"""What every stage of the lab shares: ComfyUI on the path (by dev.py), files, and a log."""

import logging
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny"
WORK = ROOT / "lab" / "work"
WEIGHTS = ROOT / "lab" / "weights"  # what the studies need beside the tiny turbo
OWN_ADAPTER = WORK / "own_adapter.safetensors"  # made by lab own_adapter
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
log = logging.getLogger("lab")


def use_comfy() -> torch.device:
    """Tell ComfyUI's memory manager which device there is, before anything of comfy is imported."""
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return torch.device("cpu" if args.cpu else "cuda")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
