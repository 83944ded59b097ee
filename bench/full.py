"""The real size: 6.15 billion random weights made on the spot, an adapter and a LoRA of rank 16, trained on 256 pixels.

Text features and latents are drawn by chance, so no file, no text encoder and no VAE is needed. Checked: the clean
weights are the same bytes afterwards, a run that is cut off and resumed gives the same bits, the LoRA has its 480 keys.
Printed: seconds a step, the peak of memory above the weights, and what was predicted. Three steps are taken in all.
--fp8: where memory is short.
"""

import argparse
import ctypes
import hashlib
import json
import platform
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import torch

from bench.gpu_files import FULL
from lab.setup import use_comfy

RANK, SIDE, WORDS = 16, 256, 30  # pixels; tokens of a caption
STEPS = 2


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench full")
    parser.add_argument("--fp8", action="store_true", help="weights in float8_e4m3fn, half the memory")
    parser.add_argument(
        "--way",
        choices=("auto", "branch", "merged"),
        default="auto",
        help="how the adapter is carried; merged needs 12 GB more",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    use_comfy()
    give_back_at_once()
    model = model_of(torch.float8_e4m3fn if args.fp8 else torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        facts = measured(model, args.way, Path(folder))
    for name, value in facts.items():
        print(f"{name}: {value}")
    if args.json:
        print(json.dumps(facts))


def give_back_at_once(least: int = 2**20):
    """Have glibc give back what is freed, so that the peak is of what is used. least: bytes of what counts.

    What it would keep for later does not count (mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
    """
    if platform.system() == "Linux":
        for option in (-3, -1):
            ctypes.CDLL(None).mallopt(option, least)


def model_of(dtype: torch.dtype):
    """MODEL of Z-Image's size with random weights, as a loader gives it: made under inference mode."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.ZImage(dict(FULL))
    device = mm.get_torch_device()
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    with torch.inference_mode():
        model = config.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            fill(name, parameter, generator)
        return comfy.model_patcher.CoreModelPatcher(model, device, mm.unet_offload_device())


def fill(name: str, parameter: torch.Tensor, generator: torch.Generator):
    """Norms 1, biases 0, matrices N(0, 0.5 / in), row by row so that nothing large is made beside the weights."""
    if parameter.ndim < 2:
        parameter.copy_(torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0))
        return
    for rows in parameter.split(1024):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.7 * parameter.shape[1] ** -0.5)


def with_adapter(model):
    """The MODEL with a random adapter of rank 16 at +1."""
    from zturbo.hosts import comfy_adapter
    from zturbo.lorafile import LoraFile
    from zturbo.lowrank import Factors

    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator).bfloat16() * shape[-1] ** -0.5 * 0.1  # noqa: E731
    targets = comfy_adapter.targets(comfy_adapter.diffusion_model(model), ("layers.",))
    factors = {
        part.name: Factors(random(RANK, target.in_features), random(part.size, RANK))
        for target in targets
        for part in target.parts
    }
    return comfy_adapter.apply(model, LoraFile(factors, {}, (), "random"), "random", 1.0)


def measured(model, way: str, folder: Path) -> dict:
    """Train, train again with a cut in the middle, and compare."""
    from zturbo import memory, network
    from zturbo.hosts import comfy_needs

    before, host = fingerprint(model), chance_host(with_adapter(model), way)
    weights = resident()
    tokens = memory.padded((SIDE // 16) ** 2) + memory.padded(WORDS)
    numbers = network.count(host.targets, host.recipe.network)
    predicted = memory.total(comfy_needs.of_step(host, numbers, tokens, True))
    with Peak() as peak:
        whole, seconds = run(host, folder / "whole")
    resumed, more = run(host, cut_off(folder / "whole", folder / "cut"))
    return {
        "steps": STEPS,
        "pixels": SIDE,
        "way": host.way,
        "seconds_per_step": round(statistics.median(seconds + more[-1:]), 2),
        "weights_gb": round(model.model_size() / 1e9, 2),
        "peak_above_weights_gb": round((peak.most - weights) / 1e9, 3),
        "predicted_gb": round(predicted / 1e9, 3),
        "process_peak_gb": round(peak.most / 1e9, 2),
        "clean": fingerprint(model) == before,
        "resumed": whole == resumed,
        "keys": len(keys(folder / "whole")),
    }


def chance_host(model, way: str):
    """ComfyHost with features and latents of chance."""
    from zturbo.dataset import Encoded
    from zturbo.hosts.comfy import ComfyHost
    from zturbo.recipe import Compute, Network, Recipe, Saving, Turbo

    class Host(ComfyHost):
        def encode(self, dataset, captions, check=lambda: None):
            generator = torch.Generator().manual_seed(2)
            self.features = [torch.randn(1, WORDS, FULL["cap_feat_dim"], generator=generator) for _ in captions.texts]
            self.image_tokens = (SIDE // 16) ** 2
            return Encoded([torch.randn(1, 16, SIDE // 8, SIDE // 8, generator=generator) for _ in dataset.items])

    return Host(
        model,
        None,
        None,
        Recipe(
            name="full",
            steps=STEPS,
            network=Network(RANK, RANK),
            compute=Compute("bf16", True, way),
            saving=Saving(1),
            turbo=Turbo(every=0),
        ),
    )


def run(host, folder: Path) -> tuple[str, list[float]]:
    """(sha256 of the LoRA's file, seconds of each step) of a run in this folder. A run that is there is taken up."""
    from zturbo import trainer
    from zturbo.roles import Unattended
    from zturbo.runfolder import RunFolder
    from zturbo.runlog import read_events

    class Control(Unattended):
        def step(self, event):
            print(
                f"step {event['step']}: {event['seconds']:.1f} s, loss {event['loss']:.4f}, {event['memory']:.1f} GB",
                file=sys.stderr,
                flush=True,
            )

    there = folder / host.recipe.name
    one = RunFolder(there) if there.is_dir() else RunFolder.new(folder, host.recipe)
    trainer.train(host.recipe, pictures(), host, one, Control(), {})
    seconds = [event["seconds"] for event in read_events(one.events) if "loss" in event]
    return hashlib.sha256(one.lora.read_bytes()).hexdigest(), seconds


def cut_off(whole: Path, folder: Path) -> Path:
    """A copy of a run's folder as it was when its last checkpoint was not there yet."""
    shutil.copytree(whole, folder)
    next(folder.rglob(f"step_{STEPS:06d}.safetensors")).unlink()
    next(folder.rglob("lora.safetensors")).unlink()
    return folder


def pictures():
    """The bundled pictures, whose captions and number count here, not their pixels."""
    from zturbo import dataset
    from zturbo.hosts import comfy_paths

    return dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (128,), "zsmile")


def keys(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(next(folder.rglob("lora.safetensors")), "pt") as lora:
        return list(lora.keys())


def fingerprint(model) -> str:
    """sha256 over every byte of every weight."""
    total = hashlib.sha256()
    with torch.inference_mode():
        for name, tensor in sorted(model.model.state_dict().items()):
            total.update(name.encode())
            for rows in tensor.reshape(-1).split(2**26):
                total.update(rows.contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def resident() -> int:
    """Bytes of main memory that the process itself holds, without what is mapped from files."""
    facts = psutil.Process().memory_info()
    return facts.rss - facts.shared


class Peak:
    """The most that is resident while open."""

    def __enter__(self) -> "Peak":
        self.most, self.closed = resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while not self.closed.wait(0.02):
            self.most = max(self.most, resident())

    def __exit__(self, *_):
        self.closed.set()
        self.thread.join()
