"""What training does to turbo: LoRAs of several unseen concepts, measured as they grow.

They train straight on turbo and on the adapter, through the pack's own trainer, with the previews' place taken by the
measurement. Every measurement is a line of `lab/work/breakdown/<concept>_<variant>_<seed>.jsonl`; what is there already
is not done again. Needs `lab reader` first.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from . import concepts, measure, world
from .setup import OWN_ADAPTER, WORK, log, use_comfy

FOLDER = WORK / "breakdown"
# the adapter's strength
VARIANTS = {
    "straight": 0.0,
    "adapter": 1.0,
    "half": 0.5,
    "strong": 1.5,
    "fading": 1.0,
    "bad": 1.0,
    "own": 1.0,
    "guard": 1.0,
    "guard_straight": 0.0,
    "restore": 1.0,
}
POINTS = (0, 250, 500, 1000, 2000, 4000, 7000, 10000)  # steps at which it is measured
EVERY = 250  # steps between two readings of the gauge
UNRELATED = {"guard": 72, "restore": 200}  # prompts of gauge and keep_turbo: none is asked for in a measurement
RESTORED = 0.5  # share of a restored run in which no pictures are trained
PICTURES = 20


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab breakdown")
    parser.add_argument("--concepts", default=",".join(concepts.CONCEPTS))
    parser.add_argument("--variants", default="straight,adapter")
    parser.add_argument("--seeds", default="0", help="as 0,1,2: of the concept's pictures and of the training")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--guard", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args(argv)
    args.points, args.seeds = POINTS, [int(seed) for seed in args.seeds.split(",")]
    device = use_comfy()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for concept in args.concepts.split(","):
            judge = None
            for variant in args.variants.split(","):
                path = FOLDER / f"{concept}_{variant}_{seed}.jsonl"
                if done(path) >= args.steps:
                    continue
                judge = judge or measure.Judge(world.load_turbo(device), concept, device)
                study(path, judge.dit, judged(judge), concept, variant, seed, args)
    print(table(args))


def table(args) -> str:
    """Means over concepts and seeds, a line a step and variant."""
    columns = ("fidelity", "sharpness", "frechet", "drift", "diversity", "steps_apart", "concept")
    lines = ["step   variant   " + "  ".join(f"{name:>11}" for name in columns)]
    for step in POINTS:
        for variant in args.variants.split(","):
            paths = [
                FOLDER / f"{concept}_{variant}_{seed}.jsonl"
                for concept in args.concepts.split(",")
                for seed in args.seeds
            ]
            found = [
                row
                for path in paths
                if path.is_file()
                for row in map(json.loads, path.read_text().splitlines())
                if row["step"] == step
            ]
            if found:
                lines.append(
                    f"{step:5}  {variant:8}  "
                    + "  ".join(f"{sum(row[name] for row in found) / len(found):11.3f}" for name in columns)
                    + f"  ({len(found)})"
                )
    return "\n".join(lines)


def done(path: Path) -> int:
    return (
        max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=-1) if path.is_file() else -1
    )


def bad_adapter(good):
    """An adapter of the same size and strength that has learnt nothing: its directions are drawn by chance."""
    from dataclasses import replace

    from zturbo.lowrank import Factors

    generator, factors = torch.Generator().manual_seed(4), {}
    for name, one in good.factors.items():
        A, B = (torch.randn(tensor.shape, generator=generator) * tensor.float().std() for tensor in (one.A, one.B))
        factors[name] = Factors(A, B, one.scale)
    return replace(good, factors=factors, sha256="bad")


def study(path: Path, dit, measured: Callable[[dict], dict], concept: str, variant: str, seed: int, args):
    """Train one LoRA through the pack's trainer.

    At the points, and before the first step, `measured(lora)` is written down while `dit`, clean turbo, carries it.
    """
    from zturbo import dataset, lorafile, roles, trainer
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_tiny
    from zturbo.runfolder import RunFolder

    folder = path.parent / "pictures" / f"{concept}_{seed}"
    concepts.write(concept, folder, PICTURES, 100 + seed)
    given = recipe(concept, variant, seed, args)
    found = dataset.from_folder(folder, (128,), concepts.TRIGGER[concept], given.data)
    model = comfy_tiny.load_model(comfy_tiny.MODEL)
    if VARIANTS[variant]:
        adapter = lorafile.read(OWN_ADAPTER if variant == "own" else comfy_tiny.ADAPTER)
        model = comfy_adapter.apply(
            model, bad_adapter(adapter) if variant == "bad" else adapter, variant, VARIANTS[variant]
        )

    class Following(roles.Unattended):
        def step(self, event):
            host.step = event["step"]
            host.recent.append(event["loss"])

        def look(self, event):
            host.gauge = {key: event[key] for key in ("gauge", "deviation")}

    host = measuring_host(
        model, comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE), given, dit, measured, path, args.points
    )
    path.unlink(missing_ok=True)
    host.write(0, {})
    log.info("%s on %s, seed %d", concept, variant, seed)
    trainer.train(given, found, host, RunFolder.new(path.parent / "runs", given), Following(), {})


def recipe(concept: str, variant: str, seed: int, args):
    from zturbo.recipe import AdapterCourse, Compute, Data, Network, Optimizer, Previews, Recipe, Saving, Turbo

    keep = variant.split("_")[0] if variant.startswith(("guard", "restore")) else "off"
    unrelated = measure.unasked(UNRELATED.get(keep, UNRELATED["guard"]))
    named = concepts.prompts(concept) if keep == "restore" else []
    if concept not in ("smiley", "photographs"):
        named = [text for text in named if text not in measure.asked_of(concept)]
    return Recipe(
        f"{concept}_{variant}_{seed}",
        args.steps,
        2,
        seed,
        data=Data(cache=False),
        network=Network(args.rank, args.rank),
        optimizer=Optimizer(learning_rate=args.learning_rate),
        compute=Compute("fp32", False, "branch" if variant in ("straight", "fading") or keep != "off" else "merged"),
        adapter=AdapterCourse(1.0, 0.0) if variant == "fading" else AdapterCourse(),
        previews=Previews(("measured",), EVERY),
        saving=Saving(EVERY, 1),
        turbo=Turbo(
            keep,
            args.guard,
            prompts=tuple(unrelated),
            size=128,
            every=EVERY,
            restore_steps=round(RESTORED * args.steps),
            restore_prompts=tuple(named),
        ),
    )


def measuring_host(model, clip, vae, given, dit, measured, path: Path, points):
    from zturbo.hosts.comfy import ComfyHost

    class MeasuringHost(ComfyHost):
        """Measures where others draw."""

        def __init__(self):
            super().__init__(model, clip, vae, given)
            self.step, self.recent, self.gauge, self.started = 0, [], {"gauge": 0.0, "deviation": 0.0}, time.time()

        def draw(self, state):
            if self.step in points:
                self.write(self.step, state)
            return [np.zeros((8, 8, 3), np.uint8)]

        def write(self, step: int, state: dict):
            if state:
                save_file(state, path.with_name(f"{path.stem}_{step:05d}.safetensors"))
            with with_lora(dit, state) as lora:
                found = measured(lora)
            line = {
                "step": step,
                "loss": round(sum(self.recent) / max(1, len(self.recent)), 5),
                "seconds": round(time.time() - self.started, 1),
                **self.gauge,
                **found,
            }
            self.recent.clear()
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%s %s", path.stem, {key: value for key, value in line.items() if not isinstance(value, list)})

    return MeasuringHost()


@contextmanager
def with_lora(dit, state: dict):
    """Turbo with a LoRA file's tensors, while the context lasts."""
    from zturbo import lorafile, lowrank
    from zturbo.hosts import comfy_adapter
    from zturbo.hosts.comfy_lend import fetchers

    lora = lorafile.parse(state)[0]
    with torch.no_grad(), lowrank.attached(fetchers(dit), comfy_adapter.targets(dit), [lora]):
        yield lora


def judged(judge: measure.Judge) -> Callable[[dict], dict]:
    return lambda lora: judge.measure().rounded() | judge.watched.read(lora)
