"""The parts that a process of `bench gpu` measures, by name."""

import platform
import time

import torch

from bench import gpu_files, gpu_limits, gpu_runs, gpu_speed
from bench.gpu_place import Place


def start(place: Place):
    """What is measured on, and the random files at the real size."""
    import comfyui_version

    name = torch.cuda.get_device_name(place.device) if place.card else platform.processor() or platform.machine()
    place.send("card", name if place.card else f"none: {name}")
    place.send("torch", torch.__version__)
    place.send("comfyui", comfyui_version.__version__)
    place.send("allocator", torch.cuda.get_allocator_backend() if place.card else "none")
    place.send("compute", place.compute)
    place.send("model", "the bundled tiny turbo" if place.tiny else "random weights at the real shapes")
    if not place.tiny:
        started = time.monotonic()
        place.send("files", gpu_files.write(place.files, place.device))
        place.send("files_s", round(time.monotonic() - started, 1))


def runs(place: Place):
    place.note("dynamic_vram", place.dynamic)
    place.note("load_s", round(place.seconds(place.model), 2))
    place.note("patcher", type(place.model()).__name__)
    place.note("weights", str(place.model().model_dtype()))
    place.note("load_text_encoder_s", round(place.seconds(place.clip), 2))
    gpu_runs.run_all(place)


PARTS = {
    "start": start,
    "runs": runs,
    "draws": gpu_runs.draws,
    "static": gpu_runs.static,
    "speed": gpu_speed.speed,
    "fp8": gpu_speed.fp8,
    "core": gpu_speed.core,
    "limits": gpu_limits.limits,
    "profile": gpu_limits.profiles,
}
