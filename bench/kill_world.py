"""Kill the processes that train a run together, again and again, and end where an unbroken run ends, to the bit.

torchrun starts `python -m zturbo train` on the bundled tiny model and diffusers' code. At a random moment one of its
processes, or several, or all get SIGKILL; the others must end by themselves. The same command goes on, until the run is
done. `hung`: times that a process was still there a while after; `unsaid`: times that whoever was left did not say
which ones were gone, and only those.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.kill import equal
from lab.setup import ROOT
from zturbo import checkpoint, runfolder, runlog
from zturbo.hosts import diffusers_tiny

RECIPE = """
batch_size = 3
network = { rank = 4, alpha = 4.0 }
optimizer = { learning_rate = 2e-3, schedule = "cosine", warmup = 5, ema = 0.9, accumulation = 2 }
compute = { dtype = "fp32", checkpointing = false }
data = { flip = true, caption_dropout = 0.2, validation = 0.2, validation_every = 50 }
turbo = { every = 0, keep = "guard", size = 64 }
saving = { every = 3, keep = 2 }
inputs = { model = "tiny", adapter = "tiny", trigger = "zsmile", resolutions = "64", pictures = 'PICTURES' }
"""
PATIENCE = 60  # seconds in which the others have ended


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench kill_world")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps-a-kill", type=int, default=20, help="the run's length, in steps for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    base, rng = Path(tempfile.mkdtemp(prefix="kill-world-")), random.Random(args.seed)
    (base / "recipe.toml").write_text(RECIPE.replace("PICTURES", str(diffusers_tiny.PICTURES)))
    print(f"{args.kills * args.steps_a_kill} steps, {args.processes} processes; the runs are in {base}.", flush=True)
    if (code := Started(base, "whole", args).process.wait()) != 0:
        raise SystemExit(f"The unbroken run ended with {code}: see {base}/whole.txt.")
    killed = hung = unsaid = 0
    while killed < args.kills and runlog.how_ended(base / "zturbo_runs" / "cut") != "finished":
        running, before = Started(base, "cut", args), last_step(base)
        while running.process.poll() is None and last_step(base) <= before:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.2 * args.steps_a_kill * pace(base)))
        victims = rng.sample(range(args.processes), rng.randint(1, args.processes))
        if not running.kill(victims):
            continue  # it came to its end before
        killed += 1
        hung += running.hangs()
        unsaid += len(victims) < args.processes and running.named_gone() != sorted(victims)
        print(f"killed {sorted(victims)} at step {last_step(base)}", flush=True)
    Started(base, "cut", args).process.wait()
    identical = same(base)
    print(f"{killed} kills, {hung} hung, {unsaid} unsaid, {'the same bits' if identical else 'OTHER BITS'} at the end.")
    good = identical and not hung and not unsaid and killed == args.kills
    if good:
        shutil.rmtree(base)
    if args.json:
        print(json.dumps({"killed": killed, "hung": hung, "unsaid": unsaid, "identical": identical}))
    return 0 if good else 1


class Started:
    """A run by torchrun. What it prints is in a file of the run's name."""

    def __init__(self, base: Path, name: str, args):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        launcher = ["torch.distributed.run", "--nproc-per-node", str(args.processes), "--master-port", str(port)]
        settings = ["--set", f"name={name}", "--set", f"steps={args.kills * args.steps_a_kill}"]
        command = [
            "-m",
            "zturbo",
            "train",
            "recipe.toml",
            "--host",
            "diffusers",
            "--device",
            "cpu",
            "--json",
            *settings,
        ]
        self.file = base / f"{name}.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *command],
            cwd=base,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=self.file.open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def said(self) -> str:
        return self.file.read_text()

    def named_gone(self) -> list[int]:
        """Who is gone, as the one who is left says it."""
        found = re.search(r"Process ([0-9, ]+) of [0-9]+ \(counted from 0\) is gone", self.said)
        return [int(number) for number in found[1].split(", ")] if found else []

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for number in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            for word in Path(f"/proc/{number}/environ").read_bytes().split(b"\0"):
                if word.startswith(b"RANK="):
                    found[int(word[5:])] = int(number)
        return found

    def kill(self, victims: list[int]) -> bool:
        """False where the run has ended."""
        try:
            there = self.workers()
            for rank in victims:
                os.kill(there[rank], signal.SIGKILL)
        except (OSError, KeyError):
            self.process.wait()
            return False
        return True

    def hangs(self) -> bool:
        try:
            self.process.wait(PATIENCE)
            return False
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return True


def last_step(base: Path) -> int:
    events = runlog.read_events(base / "zturbo_runs" / "cut" / "events.jsonl")
    return max((event["step"] for event in events if "loss" in event), default=0)


def pace(base: Path) -> float:
    """Seconds a step, as the unbroken run took them."""
    events = runlog.read_events(base / "zturbo_runs" / "whole" / "events.jsonl")
    seconds = sorted(event["seconds"] for event in events if "loss" in event)
    return seconds[len(seconds) // 2]


def same(base: Path) -> bool:
    """The final checkpoints, but for the seconds, and the losses and validations of the logs."""
    runs = [runfolder.RunFolder(base / "zturbo_runs" / name) for name in ("whole", "cut")]
    ones, others = (checkpoint.read(run.checkpoint_files()[0]) for run in runs)
    looks = [
        [
            (e["step"], e.get("loss"), e.get("held_out"))
            for e in runlog.read_events(run.events)
            if "loss" in e or "held_out" in e
        ]
        for run in runs
    ]
    return ones[1]["optimizer"] == others[1]["optimizer"] and equal(ones[0], others[0]) and looks[0] == looks[1]
