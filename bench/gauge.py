"""What the gauge costs: its share of a 2,000-step run at the trainer's defaults, on the bundled tiny turbo.

Steps, size, batch and checkpointing are the node's defaults, pictures the demo's. Time inside the gauge (walking its
paths once, reading it every 250 steps) is taken with a clock around the pack's own functions, several runs one after
another.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench gauge")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    import torch
    from comfy.cli_args import args as comfy_args

    comfy_args.cpu = not torch.cuda.is_available()
    shares, seconds = [], []
    for number in range(args.runs):
        inside, whole, readings = one_run(args.steps)
        shares.append(inside / whole)
        seconds.append(whole)
        seen = f"{inside:.2f} s of it in the gauge ({readings} readings), {100 * shares[-1]:.2f} %"
        print(f"run {number + 1}: {whole:.1f} s, {seen}", flush=True)
    median, low, high = statistics.median(shares), min(shares), max(shares)
    spread = f"(median of {args.runs}, {100 * low:.2f} to {100 * high:.2f})"
    print(f"The gauge takes {100 * median:.2f} % of a run of {args.steps} steps {spread}")
    if args.json:
        print(
            json.dumps(
                {
                    "share": round(median, 5),
                    "min": round(low, 5),
                    "max": round(high, 5),
                    "steps": args.steps,
                    "seconds": round(statistics.median(seconds), 1),
                }
            )
        )


def one_run(steps: int) -> tuple[float, float, int]:
    """(seconds in the gauge, seconds in all, readings) of a training without previews."""
    from zturbo import dataset, lorafile, trainer, turbo
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_tiny
    from zturbo.hosts.comfy import ComfyHost
    from zturbo.recipe import Compute, Data, Recipe
    from zturbo.roles import Unattended
    from zturbo.runfolder import RunFolder
    from zturbo.session import Session

    given = Recipe("gauge", steps, data=Data(cache=False), compute=Compute("fp32"))
    found = dataset.from_folder(comfy_tiny.PICTURES, (128,), "zsmile", given.data)
    model = comfy_adapter.apply(comfy_tiny.load_model(comfy_tiny.MODEL), lorafile.read(comfy_tiny.ADAPTER), "tiny", 1.0)
    host = ComfyHost(model, comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE), given)
    clock = Clock()
    with (
        clock.around(Session, "walk_references"),
        clock.around(turbo.References, "read"),
        tempfile.TemporaryDirectory() as temporary,
    ):
        began = time.perf_counter()
        result = trainer.train(given, found, host, RunFolder.new(Path(temporary), given), Unattended(), {})
        whole = time.perf_counter() - began
    assert result.steps == steps
    return clock.seconds, whole, clock.calls - 1


class Clock:
    """Adds up the time spent in functions."""

    def __init__(self):
        self.seconds, self.calls = 0.0, 0

    @contextmanager
    def around(self, owner, name: str):
        function = getattr(owner, name)

        def timed(*args, **options):
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, function)
