"""Peak main memory of a step on the same work: this pack, core's TrainLoraNode, diffusers with PEFT; and our forecast.

The work and the contenders stand in bench/peers.py. Each runs in a process of its own. Counted is the most that is
resident during its steps, less what was before its model was loaded, when all code was there already; so weights count,
and core's second copy of them. Ratios are a peer's over ours with the same choice of checkpointing; core's default has
it on, and is held against ours without.

The forecast is what `comfy_needs.of_step` says that a run needs beside the weights. It is held against runs of two
steps, with a checkpoint after each, in twelve configurations. What PyTorch's libraries keep for themselves after a
first small step is no part of it, nor of what is measured.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from bench import peers
from bench.full import Peak, give_back_at_once, resident
from bench.peers import Core, Loop, Peft, Turn, Work
from lab.setup import ROOT

MB = 1e6
SMALL = 2**16  # bytes; every tensor with a row for each token is larger


def peft(work: Work, checkpointing: bool = False) -> Turn:
    """Without the MODEL that its weights are taken from."""
    made = Peft(work, checkpointing)
    del vars(work)["model"]
    return made


CONTENDERS: dict[str, Callable[[Work], Turn]] = {
    "ours": Loop,
    "ours_checkpointed": lambda work: Loop(work, checkpointing=True),
    "core_default": Core,
    "peft": peft,
    "peft_checkpointed": lambda work: peft(work, checkpointing=True),
}
RATIOS = {
    "core_default": ("core_default", "ours"),
    "peft": ("peft", "ours"),
    "peft_checkpointed": ("peft_checkpointed", "ours_checkpointed"),
}


@dataclass(frozen=True)
class Setting:
    """A configuration whose need is foretold. adapter: how one of rank 16 is carried; empty: there is none."""

    width: int = 256
    height: int = 512
    batch: int = 1
    rank: int = 16
    checkpointing: bool = False
    adapter: str = ""

    def __str__(self) -> str:
        words = [f"{self.width} x {self.height}", f"batch {self.batch}", f"rank {self.rank}"]
        words += ["checkpointed"] if self.checkpointing else []
        return ", ".join([*words, *([self.adapter] if self.adapter else [])])


SETTINGS = (
    Setting(256, 256),
    Setting(256, 512),
    Setting(512, 512),
    Setting(768, 768, checkpointing=True),
    Setting(batch=4),
    Setting(batch=4, checkpointing=True),
    Setting(rank=64),
    Setting(rank=128, checkpointing=True),
    Setting(adapter="branch"),
    Setting(512, 512, batch=2, rank=32, adapter="branch"),
    Setting(512, 512, checkpointing=True, adapter="merged"),
    Setting(512, 768, rank=64, adapter="merged"),
)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench memory")
    parser.add_argument("--dtype", choices=tuple(peers.DTYPES), default="fp32")
    parser.add_argument("--contender", choices=tuple(CONTENDERS), help="this one alone, in this process")
    parser.add_argument("--setting", type=int, help="this configuration's forecast alone, in this process")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.contender or args.setting is not None:
        peers.one_core()
        give_back_at_once(SMALL)
        facts = contender(args.contender, args.dtype) if args.contender else forecast(args.setting, args.dtype)
        print(json.dumps(facts))
        return
    place = peers.machine()
    print(", ".join(f"{name} {value}" for name, value in {**place, "dtype": args.dtype}.items()), flush=True)
    peaks = {}
    for name in CONTENDERS:
        peaks[name] = apart("--contender", name, "--dtype", args.dtype)["peak"]
        print(f"{name:18} {peaks[name] / MB:7.0f} MB", flush=True)
    ratios = {name: round(peaks[one] / peaks[other], 3) for name, (one, other) in RATIOS.items()}
    print(", ".join(f"{name} {value}" for name, value in ratios.items()), flush=True)
    plans = {}
    for number, setting in enumerate(SETTINGS):
        found = plans[str(setting)] = apart("--setting", str(number), "--dtype", args.dtype)
        print(
            f"{setting!s:45} foretold {found['foretold'] / MB:6.0f} MB, measured {found['measured'] / MB:6.0f}, "
            f"error {found['error']:+.3f}",
            flush=True,
        )
    worst = max(abs(plan["error"]) for plan in plans.values())
    print(f"largest error of the forecast: {worst:.3f}")
    if args.json:
        print(json.dumps({**ratios, "plan_error_max": worst, "peaks": peaks, "plans": plans, **place}))


def apart(*arguments: str) -> dict:
    """What this module prints last when it runs with these arguments in a process of its own."""
    start = "import sys, bench.memory as room; sys.exit(room.main(sys.argv[1:]))"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ended = subprocess.run([sys.executable, "-c", start, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"bench memory {' '.join(arguments)}: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def furnished(work: Work) -> Work:
    """With everything that is no part of a step: all code, text encoder and VAE, and what they make."""
    import comfy_extras.nodes_train  # noqa: F401
    import diffusers_twin  # noqa: F401
    import peft  # noqa: F401
    from diffusers import ZImageTransformer2DModel  # noqa: F401

    peers.pack_module("nodes.train")
    peers.start_server_object()
    _ = work.vae, work.features
    gc.collect()
    return work


def warm(dtype: str):
    """Have PyTorch's libraries make the buffers that they keep, by a step of a model of one layer."""
    with mock.patch.dict(peers.CONFIG, n_layers=1):
        Loop(Work(dtype, 64, 64))()
    gc.collect()


def contender(name: str, dtype: str) -> dict[str, float]:
    """peak: bytes."""
    work = furnished(Work(dtype))
    before = resident()
    turn = CONTENDERS[name](work)
    gc.collect()
    with Peak() as peak:
        turn()
    return {"peak": peak.most - before}


def forecast(number: int, dtype: str) -> dict[str, float]:
    """foretold, measured: bytes beside the weights. error: of what was foretold, a share of what was measured."""
    from zturbo import dataset, memory, network, trainer
    from zturbo.hosts import comfy_needs
    from zturbo.hosts.comfy import ComfyHost
    from zturbo.roles import Unattended
    from zturbo.runfolder import RunFolder

    class Control(Unattended):
        def phase(self, name, done, total):
            if name == "training":  # before that pictures are encoded, which is no part of a step
                peak.most = resident()

    setting = SETTINGS[number]
    warm(dtype)
    work = furnished(Work(dtype, setting.width, setting.height, setting.rank))
    recipe = work.recipe(setting.checkpointing, setting.batch, setting.adapter or "auto", steps=2, save_every=1)
    host = ComfyHost(work.adapted() if setting.adapter else work.model, work.clip, work.vae, recipe)
    pictures = work.pictures(dataset)
    gc.collect()
    weights = resident()
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        trainer.train(recipe, pictures, host, RunFolder.new(Path(folder), recipe), Control(), {})
    numbers = network.count(host.targets, recipe.network)
    needs = comfy_needs.of_step(host, numbers, host.tokens(host.at_once), host.steps.keeping.bytes)
    foretold = memory.total(needs) - memory.OWN  # all code is there already
    measured = peak.most - weights
    return {"foretold": foretold, "measured": measured, "error": round(foretold / measured - 1, 4)}
