"""Everything anew, in a copy of the project.

That is autoencoder, teacher, turbo, adapter, reader, and the short form of the study.

    python dev.py lab reproduce              from nothing, into lab/work/reproduced; nothing bundled is touched
    python dev.py lab reproduce --replace    and put the new weights in the place of the bundled ones

A stage that has ended is not done again, so a cut-off run goes on. Each stage's log lies beside the copy.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .setup import ROOT, WORK, cores, log

STAGES = (
    # (name, module, arguments, files that it makes)
    ("autoencoder", "autoencoder", ("--steps", "1800"), ("models/tiny/vae.safetensors",)),
    ("teacher", "teacher", ("--compile",), ("lab/work/teacher.safetensors", "lab/weights/teacher.safetensors")),
    ("turbo", "distill", ("--compile",), ("models/tiny/z_image_turbo_tiny.safetensors",)),
    ("adapter", "adapter", (), ("models/tiny/z_image_turbo_tiny_adapter.safetensors",)),
    ("decoder", "autoencoder", ("--decoder-only", "--seed", "5"), ("models/tiny/vae.safetensors",)),
    ("reader", "reader", (), ("lab/weights/reader.safetensors",)),
)
SHORT = ("--variants", "straight,adapter,guard", "--steps", "2000")
WEIGHTS = (
    "models/tiny/vae.safetensors",
    "models/tiny/z_image_turbo_tiny.safetensors",
    "models/tiny/z_image_turbo_tiny_adapter.safetensors",
    "lab/weights/teacher.safetensors",
    "lab/weights/reader.safetensors",
)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab reproduce")
    parser.add_argument("--into", type=Path, default=WORK / "reproduced")
    parser.add_argument("--replace", action="store_true", help="put the new weights in the place of the bundled ones")
    args = parser.parse_args(argv)
    began = time.time()
    copy(args.into)
    for name, module, arguments, files in STAGES:
        if (args.into / f"{name}.done").exists():
            continue
        run(args.into, name, module, arguments)
        missing = [file for file in files if not (args.into / file).is_file()]
        if missing:
            raise SystemExit(
                f"The stage {name} did not make {', '.join(missing)}; its log is {args.into / (name + '.log')}."
            )
        (args.into / f"{name}.done").touch()
    study(args.into)
    run(args.into, "quality", "quality", ())
    table = (args.into / "quality.log").read_text(encoding="utf-8")
    print(table[table.index("Share of") :])
    log.info("%.0f minutes in all", (time.time() - began) / 60)
    if args.replace:
        for file in WEIGHTS:
            shutil.copy2(args.into / file, ROOT / file)


def copy(into: Path):
    """The project without any trained weight."""
    if (into / "lab").is_dir():
        return
    keep_out = shutil.ignore_patterns("*.safetensors", "work", ".git", "__pycache__", "*.png", "*.jpg")
    for room in ("zturbo", "lab", "models"):
        shutil.copytree(ROOT / room, into / room, ignore=keep_out)
    (into / "lab" / "work").mkdir()
    (into / "lab" / "weights").mkdir(exist_ok=True)


def start(into: Path, name: str, module: str, arguments, threads: int) -> subprocess.Popen:
    """A stage in a process of its own, on the copy."""
    comfyui = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*comfyui, str(into)]), "OMP_NUM_THREADS": str(threads)}
    code = f"import sys, lab.{module} as room; sys.exit(room.main(sys.argv[1:]))"
    log.info("%s …", name)
    with open(into / f"{name}.log", "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=into, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def run(into: Path, name: str, module: str, arguments):
    began = time.time()
    if start(into, name, module, arguments, cores()).wait():
        raise SystemExit(f"The stage {name} ended with an error; its log is {into / (name + '.log')}.")
    log.info("%s: %.1f minutes", name, (time.time() - began) / 60)


def study(into: Path):
    """The short study, a concept a process, as many at once as there are cores for."""
    from .concepts import DRAWN

    began, at_once, waiting, running = time.time(), cores(), list(DRAWN), []
    while waiting or running:
        while waiting and len(running) < at_once:
            concept = waiting.pop(0)
            running.append(start(into, f"breakdown_{concept}", "breakdown", ("--concepts", concept, *SHORT), 1))
        ended = [worker for worker in running if worker.poll() is not None]
        if any(worker.returncode for worker in ended):
            raise SystemExit(f"The study ended with an error; its logs are {into}/breakdown_*.log.")
        running = [worker for worker in running if worker not in ended]
        time.sleep(1)
    log.info("study: %.1f minutes", (time.time() - began) / 60)
