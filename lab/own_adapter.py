"""An adapter made as a user makes one, with the workflow make_adapter.

It goes through a real ComfyUI, killed in the middle of both halves, in the tiny model's measures. The adapter is
`lab/work/own_adapter.safetensors`; `lab breakdown --variants own` trains on it.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dev
from zturbo import runlog

from .setup import OWN_ADAPTER, log
from .workflows import making_adapter, read, with_tiny


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab own_adapter")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args(argv)
    comfyui, base = dev.find_comfyui(None), Path(tempfile.mkdtemp(prefix="own-adapter-"))
    drawn, run = base / "output" / "zturbo_sets" / "adapter_set", base / "output" / "zturbo" / "my_adapter"
    with dev.Server(comfyui, Path(sys.executable), base) as server:
        info = server.get("/object_info")
        prompt = making_adapter(
            with_tiny(read("make_adapter", info), read("tiny_demo", info), concept=False), args.pictures, args.steps
        )
        kill(server, prompt, lambda: len(list(drawn.glob("*.txt"))) >= args.pictures // 2)
    log.info("killed with %d of %d pictures drawn", len(list(drawn.glob("*.txt"))), args.pictures)
    with dev.Server(comfyui, Path(sys.executable), base) as server:
        kill(server, prompt, lambda: learnt(run) >= args.steps // 2)
    log.info("killed at step %d of %d", learnt(run), args.steps)
    with dev.Server(comfyui, Path(sys.executable), base) as server:
        outputs = server.run(prompt, seconds=7200)
    told = next(output["text"][0] for output in outputs.values() if "Sharpness" in output.get("text", [""])[0])
    log.info("taken up twice, %d pictures, %d steps in one run. %s", len(list(drawn.glob("*.txt"))), learnt(run), told)
    shutil.copy(base / "models" / "loras" / "my_adapter.safetensors", OWN_ADAPTER)
    shutil.rmtree(base)


def kill(server: dev.Server, prompt: dict, is_time: Callable[[], bool]):
    """Queue the prompt, and kill the server with SIGKILL when it is time."""
    job = server.queue(prompt)
    while not is_time():
        if job in server.get(f"/history/{job}"):
            raise SystemExit(f"It ended before it could be killed: {dev.error_message(server.wait(job))}")
        time.sleep(0.1)
    server.process.kill()
    server.process.wait()


def learnt(run: Path) -> int:
    """Steps of the run so far."""
    return max((event["step"] for event in runlog.read_events(run / "events.jsonl") if "loss" in event), default=0)
