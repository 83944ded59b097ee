"""What training does to turbo: LoRAs of several unseen concepts, straight on turbo and on the adapter, measured as they grow.

Through the pack's own trainer, with the previews' place taken by the measurement. Every measurement is a line of
`lab/work/breakdown/<concept>_<variant>_<seed>.jsonl`; what is there already is not done again. Needs `lab reader` first.
"""

import argparse
import json
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from . import concepts, measure, world
from .setup import WORK, log, use_comfy

FOLDER = WORK / "breakdown"
VARIANTS = {"straight": 0.0, "adapter": 1.0, "half": 0.5, "strong": 1.5, "bad": 1.0, "guard": 1.0, "guard_straight": 0.0}  # the adapter's strength
POINTS = (0, 250, 500, 1000, 2000, 4000, 7000, 10000)  # steps at which it is measured
GUARD_PROMPTS = 64
PICTURES = 20


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab breakdown")
    parser.add_argument("--concepts", default=",".join(concepts.CONCEPTS))
    parser.add_argument("--variants", default="straight,adapter")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--guard", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args(argv)
    device = use_comfy()
    for seed in range(args.seeds):
        for concept in args.concepts.split(","):
            judge = None
            for variant in args.variants.split(","):
                path = FOLDER / f"{concept}_{variant}_{seed}.jsonl"
                if done(path) >= args.steps:
                    continue
                judge = judge or measure.Judge(world.load_turbo(device), concept, device)
                study(path, judge, concept, variant, seed, args)
    print(table(args))


def table(args) -> str:
    """Means over concepts and seeds, a line a step and variant."""
    columns = ("fidelity", "sharpness", "frechet", "drift", "diversity", "steps_apart", "concept")
    lines = ["step   variant   " + "  ".join(f"{name:>11}" for name in columns)]
    for step in POINTS:
        for variant in args.variants.split(","):
            paths = [FOLDER / f"{concept}_{variant}_{seed}.jsonl" for concept in args.concepts.split(",") for seed in range(args.seeds)]
            found = [row for path in paths if path.is_file() for row in map(json.loads, path.read_text().splitlines()) if row["step"] == step]
            if found:
                lines.append(f"{step:5}  {variant:8}  " + "  ".join(f"{sum(row[name] for row in found) / len(found):11.3f}" for name in columns) + f"  ({len(found)})")
    return "\n".join(lines)


def done(path: Path) -> int:
    return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=-1) if path.is_file() else -1


def bad_adapter(good):
    """An adapter of the same size and strength that has learnt nothing: its directions are drawn by chance."""
    from dataclasses import replace

    from zturbo.lowrank import Factors

    generator, factors = torch.Generator().manual_seed(4), {}
    for name, one in good.factors.items():
        A, B = (torch.randn(tensor.shape, generator=generator) * tensor.float().std() for tensor in (one.A, one.B))
        factors[name] = Factors(A, B, one.scale)
    return replace(good, factors=factors, sha256="bad")


def study(path: Path, judge: measure.Judge, concept: str, variant: str, seed: int, args):
    """Train one LoRA and write down what it does, every `args.every` steps and before the first."""
    from zturbo import dataset, lorafile, trainer
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_tiny
    from zturbo.recipe import Compute, Data, Network, Optimizer, Previews, Recipe, Saving, Turbo
    from zturbo.runfolder import RunFolder

    folder = WORK / "concepts" / f"{concept}_{seed}"
    concepts.write(concept, folder, PICTURES, 100 + seed)
    data = Data(cache=False)
    found = dataset.from_folder(folder, (128,), concepts.TRIGGER[concept], data)
    given = Recipe(
        f"{concept}_{variant}_{seed}", args.steps, 2, seed, data=data, network=Network(args.rank, args.rank), optimizer=Optimizer(learning_rate=args.learning_rate),
        compute=Compute("fp32", False, "auto" if "guard" in variant else "merged"), previews=Previews(("measured",), 250), saving=Saving(1000, 1),
        turbo=Turbo("guard" if "guard" in variant else "off", args.guard, prompts=tuple(measure.unasked(GUARD_PROMPTS)), size=128, every=0),
    )  # fmt: skip
    model = comfy_tiny.load_model(comfy_tiny.MODEL)
    if VARIANTS[variant]:
        adapter = lorafile.read(comfy_tiny.ADAPTER)
        model = comfy_adapter.apply(model, bad_adapter(adapter) if variant == "bad" else adapter, variant, VARIANTS[variant])

    class Counting(trainer.Unattended):
        def step(self, event):
            host.step = event["step"]
            host.recent.append(event["loss"])

    host = measuring_host(model, comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE), given, judge, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    host.write(0, {})
    log.info("%s on %s, seed %d", concept, variant, seed)
    trainer.train(given, found, host, RunFolder.new(WORK / "runs", given), Counting(), {})


def measuring_host(model, clip, vae, given, judge: measure.Judge, path: Path):
    from zturbo.hosts.comfy import ComfyHost

    class MeasuringHost(ComfyHost):
        """Measures where others draw."""

        def __init__(self):
            super().__init__(model, clip, vae, given)
            self.recent, self.started = [], time.time()

        def draw(self, state):
            if self.step in POINTS:
                self.write(self.step, state)
            return [np.zeros((8, 8, 3), np.uint8)]

        def write(self, step: int, state: dict):
            save_file(state, path.with_name(f"{path.stem}_{step:05d}.safetensors")) if state else None
            with with_lora(judge.dit, state) as lora:
                found = judge.measure().rounded() | judge.watched.read(lora)
            line = {"step": step, "loss": round(sum(self.recent) / max(1, len(self.recent)), 5), "seconds": round(time.time() - self.started, 1), **found}
            self.recent.clear()
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%s %s", path.stem, {key: value for key, value in line.items() if not isinstance(value, list)})

    return MeasuringHost()


@contextmanager
def with_lora(dit, state: dict):
    """Turbo with a LoRA file's tensors, while the context lasts."""
    from zturbo import lorafile, lowrank
    from zturbo.hosts import comfy_adapter
    from zturbo.hosts.comfy import fetchers

    lora = lorafile.parse(state)[0]
    with torch.no_grad(), lowrank.attached(fetchers(dit), comfy_adapter.targets(dit), [lora]):
        yield lora
