"""Kill the server again and again, go on each time, and end where an uninterrupted run ends, to the bit.

A real ComfyUI trains on the bundled tiny model through the shipped nodes; its process is killed with SIGKILL at a
random moment of training (also in the middle of writing a checkpoint: one is written at every few steps), started
anew, and the same graph queued again. `killed`: kills; `lost`: steps of the log that are missing or doubled,
plus restarts that found nothing to go on with; `identical`: weights, optimizer, losses and LoRA file at the end.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

from safetensors import safe_open

import dev
from lab.setup import ROOT
from zturbo import checkpoint, runfolder, runlog

SETTINGS = {
    "preview_prompts": "",
    "compute_dtype": "fp32",
    "rank": 4,
    "alpha": 4.0,
    "batch_size": 2,
    "learning_rate": 2e-3,
    "gradient_checkpointing": False,
}


def graph(steps: int, every: int) -> dict:
    """Load, adapter at +1, the bundled pictures, train; the moving average and the schedule have state to lose too."""
    sys.path.append(str(ROOT / "tests"))
    import prompts

    made = prompts.training(name="kill", steps=steps, **SETTINGS)
    made["optimizer"] = prompts.node(
        "ZTurboOptimizerOptions",
        optimizer="adamw",
        weight_decay=0.01,
        max_grad_norm=1.0,
        schedule="cosine",
        warmup=5,
        restarts=1,
        decay=0,
        accumulation=1,
        ema=0.9,
    )
    made["saving"] = prompts.node("ZTurboSavingOptions", every=every, keep=2, dtype="bf16")
    made["dataset"]["inputs"] |= {"caption_dropout": 0.2, "flip": True, "validation": 0.2, "validation_every": 50}
    made["train"]["inputs"] |= {"optimizer_options": ["optimizer", 0], "saving_options": ["saving", 0]}
    made["save"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name="kill", dtype="bf16", overwrite=True)
    return made


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench kill")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--steps-a-kill", type=int, default=20, help="the run's length, in steps for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    steps = args.kills * args.steps_a_kill
    prompt, rng = graph(steps, args.every), random.Random(args.seed)
    base = Path(tempfile.mkdtemp(prefix="kill-"))
    print(f"{steps} steps, a checkpoint every {args.every}; ComfyUI's folders are in {base}.", flush=True)
    whole = base / "whole"
    with server(whole) as running:
        running.run(prompt, seconds=7200)
    cut = base / "cut"
    killed, lost = 0, 0
    while killed < args.kills:
        before = last_step(cut)
        with server(cut) as running:
            running.queue(prompt)
            if not wait_for_step(running, cut, before + 1):
                break  # the run came to its end before all kills were done
            time.sleep(rng.uniform(0, 1.2 * args.steps_a_kill * pace(whole)))
            if runlog.how_ended(folder(cut)) is not None:
                break
            running.process.kill()
            running.process.wait()
        killed += 1
        # nothing but the steps since the last checkpoint may be done again
        lost += before > 0 and last_step(cut) < before - args.every
        if killed % 10 == 0:
            print(f"killed {killed} times, at step {last_step(cut)}", flush=True)
    with server(cut) as running:
        running.run(prompt, seconds=7200)
    lost += len(list((cut / "output" / "zturbo").glob("kill*"))) - 1  # a run that was begun anew instead of taken up
    logged = [event["step"] for event in runlog.read_events(folder(cut) / "events.jsonl") if "loss" in event]
    lost += len(set(range(1, steps + 1)) ^ set(logged)) + len(logged) - len(set(logged))
    identical = same(whole, cut)
    print(f"{killed} kills, {lost} steps or runs lost, {'the same bits' if identical else 'OTHER BITS'} at the end.")
    if identical and not lost:
        shutil.rmtree(base)
    if args.json:
        print(json.dumps({"killed": killed, "lost": lost, "identical": identical}))
    return 0 if identical and not lost and killed == args.kills else 1


def server(base: Path) -> dev.Server:
    return dev.Server(dev.find_comfyui(None), Path(sys.executable), base, "--disable-metadata")


def folder(base: Path) -> Path:
    return base / "output" / "zturbo" / "kill"


def last_step(base: Path) -> int:
    return max((event.get("step", 0) for event in runlog.read_events(folder(base) / "events.jsonl")), default=0)


def pace(base: Path) -> float:
    """Seconds a step, as the uninterrupted run took them."""
    seconds = sorted(event["seconds"] for event in runlog.read_events(folder(base) / "events.jsonl") if "loss" in event)
    return seconds[len(seconds) // 2]


def wait_for_step(running: dev.Server, base: Path, step: int) -> bool:
    """True once the log has come to `step`, False when the run has ended.

    Also true after a while without steps: any moment is right for a kill.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if last_step(base) >= step and runlog.how_ended(folder(base)) is None:
            return True
        if runlog.how_ended(folder(base)) is not None and not queue_busy(running):
            return False
        time.sleep(0.05)
    return True


def queue_busy(running: dev.Server) -> bool:
    try:
        queue = running.get("/queue")
    except (urllib.error.URLError, OSError):
        return False
    return bool(queue["queue_running"] or queue["queue_pending"])


def same(a: Path, b: Path) -> bool:
    """What of a run must be the same to the bit.

    It is the final checkpoint, but for the seconds that it took; the LoRA files, every tensor and every word of the
    header; losses and validations in the log.
    """
    ones, others = (checkpoint.read(runfolder.RunFolder(folder(base)).checkpoint_files()[0]) for base in (a, b))
    if ones[1]["optimizer"] != others[1]["optimizer"] or not equal(ones[0], others[0]):
        return False
    if looks(a) != looks(b):
        return False
    for name in ("output/zturbo/kill/lora.safetensors", "models/loras/kill.safetensors"):
        files = [safe_open(base / name, "pt") for base in (a, b)]
        tensors = [{key: file.get_tensor(key) for key in file.keys()} for file in files]  # noqa: SIM118
        if files[0].metadata() != files[1].metadata() or not equal(*tensors):
            return False
    return True


def looks(base: Path) -> list[tuple]:
    """(step, loss, validation) of each line of the log that has one of the latter."""
    events = runlog.read_events(folder(base) / "events.jsonl")
    return [(e["step"], e.get("loss"), e.get("held_out")) for e in events if "loss" in e or "held_out" in e]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
