"""Does the bundled tiny turbo behave as the pack says of turbo models? In minutes, with the bundled weights.

Turbo and its undistilled teacher draw unrelated prompts at 8 steps without guidance, as turbo is used; then a LoRA of
an unseen concept trains for 1,000 steps, straight on turbo and on the adapter, through the pack's own trainer, and each
reading of its gauge is set beside the share of unrelated pictures that go wrong at 8 steps with the adapter taken away.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import breakdown, measure, world
from .setup import cores, log, use_comfy

POINTS = (0, 250, 500, 1000)
VARIANTS = ("straight", "adapter")


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab check")
    parser.add_argument("--concept", default="smiley")
    parser.add_argument("--pictures", type=int, default=288, help="unrelated pictures a measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        workers = {variant: start(variant, Path(temporary), args) for variant in VARIANTS}
        device = use_comfy()
        asked = measure.Asked(args.pictures, device)
        turbo8, teacher8 = asked.right(world.load_turbo(device)), asked.right(world.load_teacher(device))
        for name, right in (("turbo, 8 steps", turbo8), ("teacher, 8 steps", teacher8)):
            share, low, high = measure.interval(right)
            log.info(
                "%s: %.3f of %d unrelated pictures right (95 %% interval %.3f to %.3f)",
                name,
                share,
                args.pictures,
                low,
                high,
            )
        for variant, worker in workers.items():
            if worker.wait():
                raise SystemExit(f"The training {variant} ended with an error.")
        lines = {
            variant: [
                json.loads(line)
                for line in file_of(variant, Path(temporary), args).read_text(encoding="utf-8").splitlines()
            ]
            for variant in VARIANTS
        }
    clean = lines["straight"][0]["fidelity"]
    for row in (row for rows in lines.values() for row in rows):
        row["lost"] = 1 - row["fidelity"] / clean
    points = [(row["gauge"], row["lost"]) for rows in lines.values() for row in rows if row["step"]] + [(0.0, 0.0)]
    for variant, rows in lines.items():
        for row in rows:
            log.info(
                "%s step %d: gauge %.3f, of turbo lost %.3f, loss %.4f",
                variant,
                row["step"],
                row["gauge"],
                row["lost"],
                row["loss"],
            )
    facts = {
        "turbo8": round(turbo8.float().mean().item(), 4),
        "teacher8": round(teacher8.float().mean().item(), 4),
        "straight_loss": round(lines["straight"][-1]["lost"], 4),
        "adapter_loss": round(lines["adapter"][-1]["lost"], 4),
        "gauge_rank_correlation": round(measure.rank_correlation(*zip(*points)), 4),
    }
    print(json.dumps(facts))


def file_of(variant: str, folder: Path, args) -> Path:
    return folder / f"{args.concept}_{variant}_0.jsonl"


def start(variant: str, folder: Path, args) -> subprocess.Popen:
    """A process of its own for each training, so that they share the cores."""
    code = "import sys, lab.check as room; room.train(*sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // 2))}
    return subprocess.Popen(
        [sys.executable, "-c", code, variant, str(folder), args.concept, str(args.pictures)], env=environment
    )


def train(variant: str, folder: str, concept: str, count: str):
    device = use_comfy()
    asked, dit = measure.Asked(int(count), device), world.load_turbo(device)
    args = argparse.Namespace(steps=POINTS[-1], points=POINTS, guard=1.0, rank=16, learning_rate=5e-4)
    breakdown.study(
        Path(folder) / f"{concept}_{variant}_0.jsonl",
        dit,
        lambda lora: {"fidelity": asked.right(dit).float().mean().item()},
        concept,
        variant,
        0,
        args,
    )
