"""A process of `bench gpu`: ComfyUI's code without its server, set up as its main.py does, measuring parts.

Dynamic VRAM and PyTorch's allocator (mostly cudaMallocAsync) are chosen before comfy is imported, so there is a process
for each choice. It reads lines "part seconds" and answers each with facts, as JSON lines, and how the part ended. What
ComfyUI prints goes to stderr.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


class Answers:
    """What the command reads: the standard output, which nothing else here writes to any more."""

    def __init__(self):
        self.file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, **answer):
        self.file.write(json.dumps(answer, default=str) + "\n")
        self.file.flush()


def work(dynamic: bool, tiny: bool, native: bool, files: Path):
    answers = Answers()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    device = start_comfy(dynamic, native)
    from bench.gpu_parts import PARTS
    from bench.gpu_place import Place

    place = Place(device, tiny, files, lambda key, value: answers.send(key=key, value=value))
    answers.send(ready=True)
    for line in sys.stdin:
        name, seconds = line.split()
        place.begin(name, float(seconds))
        answers.send(ended="done" if measured(PARTS[name], place) else "failed")


def measured(part: Callable, place) -> bool:
    """Did it end well? What went wrong becomes a fact."""
    try:
        part(place)
        return True
    except Exception as error:
        traceback.print_exc()
        place.note("failed", said(error))
        return False
    finally:
        place.rest()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:600]}"


def start_comfy(dynamic: bool, native: bool):
    """The device that ComfyUI trains on, after its memory manager is set up as its main.py sets it up."""
    from comfy.cli_args import args

    args.disable_cuda_malloc = native
    import cuda_malloc  # noqa: F401  chooses PyTorch's allocator, before torch is imported
    import torch

    args.cpu = not torch.cuda.is_available()
    args.disable_dynamic_vram = not dynamic
    wanted = dynamic and not args.cpu
    if wanted:
        import comfy_aimdo.control

        comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True)
    import comfy.model_management
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    if wanted and comfy.model_management.is_nvidia():
        enable_dynamic_vram()
    return comfy.model_management.get_torch_device()


def enable_dynamic_vram():
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    devices = comfy.model_management.get_all_torch_devices()
    if comfy_aimdo.control.init_devices((device.index, 0) for device in devices):
        comfy_aimdo.control.set_log_warning()
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


if __name__ == "__main__":
    kind, size, allocator, files = sys.argv[1:]
    work(kind == "dynamic", size == "tiny", allocator == "native", Path(files))
