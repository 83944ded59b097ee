"""What teacher and turbo draw, in 8 steps and in many: the table that `lab reproduce` ends with."""

import argparse

from . import breakdown, measure, world
from .setup import use_comfy

ROWS = (
    # (name, loads, guidance, Euler steps between two of the eight noise levels)
    ("teacher, 24 steps, CFG 2", world.load_teacher, 2.0, 3),
    ("teacher, 8 steps, CFG 2", world.load_teacher, 2.0, 1),
    ("turbo before distillation (the teacher), 8 steps, CFG 1", world.load_teacher, 1.0, 1),
    ("turbo, 8 steps, CFG 1", world.load_turbo, 1.0, 1),
    ("turbo, 24 steps, CFG 1", world.load_turbo, 1.0, 3),
)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab quality")
    parser.add_argument("--pictures", type=int, default=528)
    args = parser.parse_args(argv)
    device = use_comfy()
    asked = measure.Asked(args.pictures, device)
    print(f"Share of {args.pictures} unrelated pictures that are right in every respect (95 % interval)")
    for name, load, guidance, substeps in ROWS:
        share, low, high = measure.interval(asked.right(load(device), guidance, substeps))
        print(f"{name:56} {share:.3f}  ({low:.3f} to {high:.3f})", flush=True)
    if breakdown.FOLDER.is_dir():
        short = argparse.Namespace(
            variants="straight,adapter,guard", concepts=",".join(breakdown.concepts.DRAWN), seeds=[0]
        )
        print("\nThe short study, means over concepts\n" + breakdown.table(short))
