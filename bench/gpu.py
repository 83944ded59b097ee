"""The pack on a card at the real size: one command that ends within ten minutes and writes one JSON file.

Weights are random at Z-Image's real shapes, bf16 and fp8, so nothing is fetched; `--tiny` takes the bundled model on
any device instead. Each part has its own share of the time, and what fails in one is a fact beside the others':

    static    without dynamic VRAM (--disable-dynamic-vram): load, two runs, clean weights, one timed step
    runs      three runs in a session, stop and resume: the same bits, clean weights, what a checkpoint costs
    draws     8 steps at 1024, without and with the LoRA
    speed     seconds a step and memory at each side, merged and branch, in turn with diffusers + PEFT
    fp8       the same on fp8 weights, without a peer
    core      core's TrainLoraNode on the same work, plain and in bypass mode
    tests     tests/card on the real card
    limits    the same step with 8, 12, 16, 24 GB of the card left to use
    profile   the ten largest costs of a step, its waits and its launches

Facts are named `part.what`, times in seconds, memory in GB (1e9 bytes). torch_gb: the most that PyTorch has allocated;
step_gb: how much of it a step adds; card_gb: the most that the whole card had in use; own_gb: how much of that was not
there before. `part.failed` says what went wrong.

`--prepare FOLDER` packs what a machine without a package index needs (see gpu_pack).
"""

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import gpu_tests

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 150  # for a process to be ready, and for the files to be written
WHOLE = 560  # seconds that all parts may take together, unless --seconds says otherwise
GRACE = 20  # seconds by which a part may be late before its process is ended
ROOM = 45e9  # bytes that must be free where the files go


@dataclass(frozen=True)
class Part:
    """kind: of the process that measures it; seconds: that it may take at most, of WHOLE."""

    name: str
    kind: str
    seconds: float


PARTS = (
    Part("static", "static", 70),
    Part("runs", "dynamic", 130),
    Part("draws", "dynamic", 25),
    Part("speed", "dynamic", 110),
    Part("fp8", "dynamic", 50),
    Part("core", "dynamic", 70),
    Part("tests", "tests", 150),
    Part("limits", "dynamic", 110),
    Part("profile", "dynamic", 40),
)


class Lost(Exception):
    """A process ended, or had to be ended, before its part was done."""


@dataclass
class Facts:
    """All that is known so far, in a file that is rewritten at each fact."""

    out: Path | None
    tiny: bool
    started: float = field(default_factory=time.monotonic)
    known: dict = field(default_factory=dict)

    def note(self, key: str, value):
        self.known[key] = value
        print(f"[{time.monotonic() - self.started:6.1f}] {key}: {json.dumps(value)}", flush=True)
        out = self.file()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            beside = out.with_name(out.name + ".part")
            beside.write_text(json.dumps(self.known, indent=1) + "\n", encoding="utf-8")
            beside.replace(out)

    def file(self) -> Path | None:
        """Where the facts go: without `--out` a real card has its own name, once it is known, and the rest has none."""
        if self.out is None and not self.tiny and self.card:
            name = re.sub(r"[^a-z0-9]+", "-", self.known["card"].lower()).strip("-")
            self.out = ROOT / "bench" / "results" / f"gpu-{name}-{time.strftime('%Y-%m-%d')}.json"
        return self.out

    @property
    def card(self) -> bool:
        return not self.known.get("card", "none").startswith("none")

    @property
    def failed(self) -> list[str]:
        return [key for key in self.known if key.endswith(".failed")]


class Worker:
    """A process that measures one part after another (see gpu_worker)."""

    def __init__(self, kind: str, words: tuple[str, ...], files: Path):
        self.kind = kind
        command = [sys.executable, "-m", "bench.gpu_worker", kind, *words, str(files)]
        places = [os.environ["COMFYUI_PATH"], str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        # not in the project's folder, whose nodes/ would hide ComfyUI's nodes.py
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=files, env=env, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def answer(self, until: float) -> dict:
        try:
            line = self.lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise Lost("it took longer than its share of the time, and was ended") from None
        if not line:
            raise Lost(f"its process ended with code {self.process.wait()}; the reason is in what was printed")
        return json.loads(line)

    def wait_until_ready(self):
        self.answer(time.monotonic() + START_SECONDS)

    def measure(self, part: str, seconds: float, facts: Facts) -> bool:
        """Did the part end well? Raises Lost."""
        self.process.stdin.write(f"{part} {seconds}\n")
        self.process.stdin.flush()
        until = time.monotonic() + seconds + GRACE
        while True:
            answer = self.answer(until)
            if "ended" in answer:
                return answer["ended"] == "done"
            facts.note(answer["key"], answer["value"])

    def close(self):
        self.process.kill()
        self.process.wait()


class Bench:
    """Parts in turn, neighbours of a kind in one process; a process in which something failed is not used again."""

    def __init__(self, args, parts: list[Part], facts: Facts, files: Path):
        self.tiny, self.parts, self.facts, self.files = args.tiny, parts, facts, files
        self.words = ("tiny" if args.tiny else "real", "native" if args.native_allocator else "comfyui")
        self.until = time.monotonic() + args.seconds
        self.worker: Worker | None = None

    def run(self):
        try:
            if self.measure(Part("start", "static", START_SECONDS), START_SECONDS):
                for number, part in enumerate(self.parts):
                    self.one(part, sum(other.seconds for other in self.parts[number + 1 :]))
        finally:
            self.close()

    def one(self, part: Part, after: float):
        """after: seconds that the parts after this one would like; half of it is kept for them."""
        begun, left = time.monotonic(), self.until - time.monotonic()
        seconds = min(part.seconds, max(left - after / 2, left * part.seconds / (part.seconds + after)))
        if left < 3:
            self.facts.note(f"{part.name}.skipped", "not reached: the time was used up")
            return
        if part.kind == "tests":
            if self.facts.card:
                self.close()  # the card is theirs alone
            self.facts.note(part.name, gpu_tests.run(self.facts.card, self.tiny, seconds))
        else:
            self.measure(part, seconds)
        self.facts.note(f"{part.name}.took_s", round(time.monotonic() - begun, 1))

    def measure(self, part: Part, seconds: float) -> bool:
        try:
            done = self.open(part.kind).measure(part.name, seconds, self.facts)
        except (Lost, OSError) as reason:
            self.facts.note(f"{part.name}.failed", str(reason))
            done = False
        if not done:
            self.close()
        return done

    def open(self, kind: str) -> Worker:
        if self.worker is None or self.worker.kind != kind:
            self.close()
            self.worker = Worker(kind, self.words, self.files)
            self.worker.wait_until_ready()
        return self.worker

    def close(self):
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def main(argv: list[str]) -> int:
    args = options().parse_args(argv)
    if args.prepare:
        from bench import gpu_pack

        return gpu_pack.prepare(Path(args.prepare), Path(os.environ["COMFYUI_PATH"]), args.json)
    parts = chosen(args.parts, args.seconds / WHOLE)
    if not args.tiny and not has_card():
        raise SystemExit("bench gpu: PyTorch sees no NVIDIA card here. --tiny takes the bundled model on any device.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files go, too
    facts = Facts(None if args.out is None else Path(args.out).absolute(), args.tiny)
    files = Path(tempfile.mkdtemp(prefix="zturbo-gpu-", dir=None if args.tiny else roomy()))
    try:
        Bench(args, parts, facts, files).run()
    finally:
        shutil.rmtree(files, ignore_errors=True)
    facts.note("total_s", round(time.monotonic() - facts.started, 1))
    if args.json:
        print(json.dumps(facts.known))
    return 1 if facts.failed else 0


def options() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench gpu", description=__doc__, formatter_class=plain)
    parser.add_argument("--tiny", action="store_true", help="the bundled model, on any device, in two minutes")
    parser.add_argument("--parts", help="only these, as a list with commas")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="for all parts together")
    parser.add_argument("--out", help="the file of facts; else bench/results/gpu-CARD-DATE.json for a real card")
    parser.add_argument("--native-allocator", action="store_true", help="as ComfyUI has with --disable-cuda-malloc")
    folder = {"metavar": "FOLDER", "nargs": "?", "const": str(ROOT / "build" / "gpu")}
    parser.add_argument("--prepare", **folder, help="pack for a bare machine, into this folder (build/gpu)")
    parser.add_argument("--json", action="store_true")
    return parser


def chosen(words: str | None, scale: float) -> list[Part]:
    """The parts of a list with commas, or all; their time is scaled."""
    names = [part.name for part in PARTS]
    wanted = names if words is None else [word.strip() for word in words.split(",")]
    unknown = [word for word in wanted if word not in names]
    if unknown:
        raise SystemExit(f"bench gpu: there is no part {unknown[0]!r}; choose from {', '.join(names)}.")
    return [replace(part, seconds=scale * part.seconds) for part in PARTS if part.name in wanted]


def has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def roomy() -> str:
    """A folder for the files, in memory where there is room. Ends with a sentence where there is none."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if os.path.isdir(folder) and shutil.disk_usage(folder).free > ROOM:
            return folder
    need = f"bench gpu: its files need {ROOM / 1e9:.0f} GB free in /dev/shm or {tempfile.gettempdir()}."
    raise SystemExit(f"{need} Set TMPDIR to a folder with room.")
