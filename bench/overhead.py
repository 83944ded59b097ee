"""The share of a training step that is outside the model's forward, backward and optimizer, and where it goes.

The Train node of bench/peers.py (dim 768, one processor core) runs as ComfyUI runs it, with the panel's events built
and written as JSON for one open page. Whole: all that the process does from the first measured step to the end of the
last one, and a share of a save (of every 250 steps, as the recipe has it). Inside: the velocity, backward and the
optimizer's step. Parts are times of the thread that trains, each without the parts in it. Processor seconds.
"""

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from bench import peers
from bench.peers import Node, Work, clock, pack_module

INSIDE = ("velocity", "backward", "optimizer")
WARM = 2  # steps
ALLOWED = 0.03


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench overhead")
    parser.add_argument("--steps", type=int, default=10, help="measured ones")
    parser.add_argument("--tokens", choices=("256", "512", "1024"), default="512")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    peers.one_core()
    place = peers.machine()
    print(", ".join(f"{name} {value}" for name, value in place.items()), flush=True)
    width, height = {"256": (256, 256), "512": (256, 512), "1024": (512, 512)}[args.tokens]
    found = measured(Work("fp32", width, height), args.steps)
    whole = found["whole"]
    for name, seconds in sorted(found.items(), key=lambda part: -part[1]):
        print(f"{name:24} {seconds * 1000:10.3f} ms a step, {seconds / whole:8.3%}")
    outside = 1 - sum(found[name] for name in INSIDE) / whole
    print(f"outside: {outside:.3%} of a step of {whole:.3f} s (at most {ALLOWED:.0%})")
    if args.json:
        print(
            json.dumps({"outside": round(outside, 5), "seconds": {k: round(v, 6) for k, v in found.items()}, **place})
        )


class Parts:
    """Seconds of the training thread by part, each without those that are inside it, while it is on."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.open: list[float] = []  # seconds of the parts inside each open one
        self.on = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.thread_time()
        self.open.append(0.0)
        try:
            yield
        finally:
            took = time.thread_time() - started
            if self.on:
                self.seconds[name] += took - self.open[-1]
            self.open.pop()
            if self.open:
                self.open[-1] += took

    def watched(self, name: str, function: Callable) -> Callable:
        def called(*given, **named):
            with self.part(name):
                return function(*given, **named)

        return called


def measured(work: Work, steps: int) -> dict[str, float]:
    """Seconds a step: whole, and by part."""
    node, parts, whole, saves = Node(work), Parts(), [], []
    trainer, every = pack_module("zturbo.trainer"), pack_module("zturbo.recipe").Saving().every
    node.values["steps"] = WARM + steps
    plain_step, plain_finish = trainer.step, trainer.finish

    def step(session, *given):
        parts.on = session.state.step >= WARM
        with parts.part("the step itself"):
            plain_step(session, *given)
        whole.append(clock())

    def finish(session):
        parts.on, started = False, clock()
        result = plain_finish(session)
        saves.append(clock() - started)
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "step", step))
        stack.enter_context(mock.patch.object(trainer, "finish", finish))
        for where, name, part in places(parts):
            stack.enter_context(mock.patch.object(where, name, parts.watched(part, getattr(where, name))))
        stack.enter_context(with_velocity(parts))
        stack.enter_context(with_page())
        node()
    save = saves[0] / every
    found = {name: seconds / steps for name, seconds in parts.seconds.items()}
    total = (whole[-1] - whole[WARM - 1]) / steps
    found["other threads, between"] = total - sum(found.values())
    return {**found, f"a save in {every} steps": save, "whole": total + save}


def places(parts: Parts) -> list[tuple]:
    """(where, name of a function there, what it is called in the table)."""
    hooks, control = pack_module("zturbo.hooks"), pack_module("zturbo.hosts.comfy_control").ComfyControl
    host, folder = pack_module("zturbo.hosts.comfy").ComfyHost, pack_module("zturbo.runfolder").RunFolder
    return [
        (torch.Tensor, "backward", "backward"),
        (torch.optim.AdamW, "step", "optimizer"),
        (torch.nn.utils, "clip_grad_norm_", "clipping"),
        (pack_module("zturbo.batches").Pictures, "at", "batch"),
        (pack_module("zturbo.flow"), "generator", "counters"),
        (pack_module("zturbo.step"), "check", "is the loss good"),
        (folder, "event", "log"),
        (host, "memory", "memory facts"),
        (host, "told", "what the host says"),
        (control, "check", "is it cancelled"),
        (control, "step", "panel"),
        *((hook, "after_step", f"hook {hook.__name__}") for hook in map(type, hooks.all_hooks())),
    ]


@contextlib.contextmanager
def with_velocity(parts: Parts) -> Iterator[None]:
    """The host's velocity is watched."""
    host = pack_module("zturbo.hosts.comfy").ComfyHost
    plain = host.training

    @contextlib.contextmanager
    def training(self, lora):
        with plain(self, lora) as velocity:
            yield parts.watched("velocity", velocity)

    with mock.patch.object(host, "training", training):
        yield


@contextlib.contextmanager
def with_page() -> Iterator[None]:
    """The server writes each event as JSON, as it does for one open page."""
    from server import PromptServer

    plain = PromptServer.send_sync

    def send_sync(self, event, data, sid=None):
        json.dumps({"type": str(event), "data": data}, default=str)
        plain(self, event, data, sid)

    with mock.patch.object(PromptServer, "send_sync", send_sync):
        yield
