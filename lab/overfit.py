"""Overfit on purpose: real photographs, a part held out, and both losses at fixed noise levels in one plot.

A dozen crops of seven photographs (scikit-image's), a quarter of them held out. The tiny turbo has never seen a
photograph, so what it learns from the trained crops serves the others too, until it learns them by heart.
Through the pack's own trainer and its own validation; the plot is drawn from the run's event log.
"""

import argparse
import json
import tempfile
from pathlib import Path

from lab import photographs
from lab.setup import ROOT, log, use_comfy


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab overfit")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    use_comfy()
    from zturbo import dataset, lorafile, plots, roles, runlog, trainer
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_tiny
    from zturbo.hosts.comfy import ComfyHost
    from zturbo.recipe import Compute, Data, Network, Optimizer, Recipe
    from zturbo.runfolder import RunFolder

    class Watched(roles.Unattended):
        def look(self, event):
            log.info("step %5d  trained %.4f  held out %.4f", event["step"], event["trained"], event["held_out"])

    with tempfile.TemporaryDirectory() as temporary:
        pictures = Path(temporary) / "pictures"
        photographs.write(pictures, args.pictures)
        options = Data(validation=0.25, validation_every=50, cache=False)
        found = dataset.from_folder(pictures, (photographs.SIDE,), "", options)
        given = Recipe(
            "overfit",
            args.steps,
            2,
            data=options,
            network=Network(args.rank, args.rank),
            optimizer=Optimizer(learning_rate=args.learning_rate),
            compute=Compute("fp32", False),
        )
        run = RunFolder.new(Path(temporary), given)
        model = comfy_adapter.apply(
            comfy_tiny.load_model(comfy_tiny.MODEL), lorafile.read(comfy_tiny.ADAPTER), "tiny", 1.0
        )
        host = ComfyHost(model, comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE), given)
        trainer.train(given, found, host, run, Watched(), {})
        looks = [event for event in runlog.read_events(run.events) if event.get("event") == "validation"]
    series = {
        name: [(event["step"], event[key]) for event in looks]
        for name, key in (("trained on", "trained"), ("held out", "held_out"))
    }
    args.out.mkdir(parents=True, exist_ok=True)
    plots.curves(
        series, f"Loss at fixed noise levels, {len(found.items)} photographs, {len(found.held_out())} held out", "step"
    ).save(args.out / "overfit.png")
    facts = {
        name: {
            "first": points[0][1],
            "lowest": min(points, key=lambda p: p[1])[1],
            "at": min(points, key=lambda p: p[1])[0],
            "last": points[-1][1],
        }
        for name, points in series.items()
    }
    (args.out / "overfit.json").write_text(
        json.dumps({"steps": args.steps, "series": series, **facts}, indent=1) + "\n", encoding="utf-8"
    )
    for name, fact in facts.items():
        lowest = f"lowest {fact['lowest']:.4f} at step {fact['at']}"
        print(f"{name:10}  first {fact['first']:.4f}  {lowest}  last {fact['last']:.4f}")
    print(f"The plot: {args.out / 'overfit.png'}")
    if args.json:
        print(json.dumps(facts))
