"""What the parts of `bench gpu` share: models, files, time left, clocks and memory."""

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch

from bench import gpu_files
from zturbo import lorafile
from zturbo.hosts import comfy_adapter, comfy_load, comfy_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute, Network, Recipe

GB = 1e9
TOKENS = 64  # of a caption


class Place:
    """Where a part measures. note: takes a fact, whose name is put behind the part's."""

    def __init__(self, device: torch.device, tiny: bool, files: Path, send: Callable[[str, object], None]):
        self.device, self.tiny, self.files, self.send = device, tiny, files, send
        self.card = device.type == "cuda"
        self.compute = "bf16" if self.card else "fp32"  # a CPU takes ten times as long in bf16
        self.sides = (128,) if tiny else (512, 768, 1024)
        self.rounds = 3 if tiny else 7  # timed steps of each contender
        self.part, self.until = "", 0.0
        self.held = 0.0  # GB of the card, by a block that stands for a smaller card
        self.loaded: dict[tuple, object] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of weights that are not fp8."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.compute]

    @property
    def dynamic(self) -> bool:
        return comfy.memory_management.aimdo_enabled

    def begin(self, part: str, seconds: float):
        self.part, self.until = part, time.monotonic() + seconds

    def note(self, key: str, value):
        self.send(f"{self.part}.{key}", value)

    def left(self, seconds: float, key: str) -> bool:
        """Are so many seconds of the part's time left? Where not, that is the fact."""
        enough = self.until - time.monotonic() > seconds
        if not enough:
            self.note(key, "not reached: the time of this part was used up")
        return enough

    @contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """What fails in here becomes a fact, and the part goes on."""
        try:
            yield
        except Exception as error:
            self.note(f"{key}.failed", f"{type(error).__name__}: {str(error)[:600]}")
            self.sweep()

    def sync(self):
        if self.card:
            torch.cuda.synchronize()

    def sweep(self):
        """Give back what nothing holds any more."""
        gc.collect()
        comfy.model_management.soft_empty_cache()

    def rest(self):
        """Take every model off the device."""
        comfy.model_management.unload_all_models()
        self.sweep()

    # Models, each loaded once

    def once(self, key: tuple, load: Callable):
        if key not in self.loaded:
            with torch.inference_mode():  # as a loader node runs
                self.loaded[key] = load()
        return self.loaded[key]

    def model(self, dtype: str = "bf16", number: int = 0):
        """MODEL. number: 0, 1, … are models of their own, with the same weights."""
        return self.once(("model", dtype, number), lambda: self.load_model(dtype))

    def load_model(self, dtype: str):
        if self.tiny:
            return tiny_fp8(self.dtype) if dtype == "fp8" else comfy_tiny.load_model(comfy_tiny.MODEL, self.dtype)
        return comfy_load.load_model(self.files / gpu_files.MODELS[dtype])

    def clip(self):
        path = self.files / gpu_files.TEXT_ENCODER
        return self.once(("clip",), comfy_tiny.load_clip if self.tiny else lambda: comfy_load.load_clip(path))

    def vae(self):
        return self.once(("vae",), lambda: comfy_load.load_vae(comfy_tiny.VAE))

    def adapted(self, dtype: str = "bf16", number: int = 0):
        """MODEL with the de-distill adapter on."""
        path = comfy_tiny.ADAPTER if self.tiny else self.files / gpu_files.ADAPTER
        with torch.inference_mode():
            return comfy_adapter.apply(self.model(dtype, number), lorafile.read(path), path.name, 1.0)

    def host(self, recipe: Recipe, dtype: str = "bf16", number: int = 0, cache: Path | None = None) -> ComfyHost:
        return ComfyHost(self.adapted(dtype, number), self.clip(), self.vae(), recipe, cache=cache)

    def recipe(self, way: str, checkpointing: bool, **other) -> Recipe:
        """Rank 16, batch 1."""
        compute = Compute(self.compute, checkpointing, way, keep_layers=0)
        return Recipe(network=Network(gpu_files.RANK, float(gpu_files.RANK)), compute=compute, **other)

    def config(self) -> dict:
        """Of the diffusion model."""
        return comfy_tiny.config()["unet_config"] if self.tiny else gpu_files.FULL

    @property
    def lora(self) -> Path:
        """Where the last LoRA that was trained lies, for the parts that draw."""
        return self.files / "trained.safetensors"

    # Clocks and memory

    def seconds(self, work: Callable[[], object]) -> float:
        self.sync()
        started = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - started

    def card_gb(self) -> float:
        """What the whole card has in use: weights under dynamic VRAM are not in PyTorch's own count."""
        if not self.card:
            return 0.0
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / GB - self.held

    @contextmanager
    def memory(self) -> Iterator[dict[str, float]]:
        """Filled when it closes: the most that PyTorch allocated and reserved, and that the card had in use, in GB."""
        most, stop = {"card_gb": self.card_gb()}, threading.Event()

        def watch():
            while not stop.wait(0.02):
                most["card_gb"] = max(most["card_gb"], self.card_gb())

        watcher = threading.Thread(target=watch, daemon=True)
        if self.card:
            torch.cuda.reset_peak_memory_stats(self.device)
            watcher.start()
        try:
            yield most
        finally:
            stop.set()
            if self.card:
                watcher.join()
                most["torch_gb"] = torch.cuda.max_memory_allocated(self.device) / GB - self.held
                most["reserved_gb"] = torch.cuda.max_memory_reserved(self.device) / GB - self.held
            most.update({name: round(value, 2) for name, value in most.items()})


def tiny_fp8(compute: torch.dtype):
    """The bundled MODEL with fp8 weights that are cast where they are used, as core's loader has it for such files."""
    config = comfy.supported_models.ZImage(dict(comfy_tiny.config()["unet_config"]))
    config.set_inference_dtype(torch.float8_e4m3fn, compute)
    model = config.get_model({}, "")
    state = comfy.utils.load_torch_file(str(comfy_tiny.MODEL), safe_load=True)
    model.load_model_weights(gpu_files.as_fp8({name: w.to(torch.bfloat16) for name, w in state.items()}), "")
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return comfy.model_patcher.CoreModelPatcher(model, *devices)


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "of": len(values),
    }
