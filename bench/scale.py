"""What a run costs by its size: tokens, batch, rank and layers of a step, and pictures of a dataset, 10 to 100,000.

A step is that of bench/peers.py (dim 768, one processor core); ratios are to the smallest of each row. Pictures are
PNGs of 32 x 32 pixels, each with a caption of its own beside it, trained on the bundled tiny model, so that next to
nothing but their number costs. Everything is encoded: the cache is filled with numbers of chance, by its own keys. For
each number of pictures there are

- read: the folder is read for the first time, and every picture is decoded
- read again: the same with no file changed; of them, listing: which files there are and what belongs to whom
- captions, digest, encode: parts of the start; encode finds every latent and every text
- start: a run from the call to the end of its first step, all of the parts above but reading in it
- first step of an epoch: its order is made
- batch: a step's pictures, captions and noise levels, without the model

Times are the processor's, of all threads of the process, where it is not said that they are the wall's.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench import peers
from bench.peers import CONFIG, Loop, Work, clock

SIZES = (10, 100, 1_000, 10_000, 100_000)
SIDE = 32  # pixels
KINDS = 64  # of pictures; each file has bytes of its own behind
STEPS = 200  # of which a batch's time is the mean
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (256, 512, 1024),
    "batch": (1, 2, 4),
    "rank": (4, 16, 64, 128),
    "layers": (2, 4, 8),
}
SHAPES = {256: (256, 256), 512: (256, 512), 1024: (512, 512)}  # pixels of so many tokens


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench scale")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="pictures of the largest dataset")
    parser.add_argument("--no-steps", action="store_true", help="datasets alone")
    parser.add_argument("--folder", type=Path, help="where the datasets are made, and left")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    peers.one_core()
    place = peers.machine()
    print(", ".join(f"{name} {value}" for name, value in place.items()), flush=True)
    steps = {} if args.no_steps else {name: axis(name, values) for name, values in AXES.items()}
    with contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        datasets = {n: pictures(n, Path(folder)) for n in SIZES if n <= args.largest}
    if args.json:
        print(json.dumps({"step": steps, "pictures": datasets, **place}))


# A step


def axis(name: str, values: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Of each value the seconds of a step, and their ratio to the first's."""
    found: dict[int, dict[str, float]] = {}
    for value in values:
        seconds = step_of(name, value)
        first = found[values[0]]["seconds"] if found else seconds
        found[value] = {"seconds": round(seconds, 3), "ratio": round(seconds / first, 3)}
        print(f"{name} {value:5}: {seconds:8.3f} s, {seconds / first:6.2f} times {values[0]}'s", flush=True)
    return found


def step_of(name: str, value: int) -> float:
    """Seconds of the quickest step."""
    width, height = SHAPES[value if name == "tokens" else 256]
    work = Work("fp32", width, height, value if name == "rank" else 16)
    with mock.patch.dict(CONFIG, n_layers=value if name == "layers" else CONFIG["n_layers"]):
        seconds = min(Loop(work, batch=value if name == "batch" else 1)())
    gc.collect()
    return seconds


# Pictures


def pictures(count: int, folder: Path) -> dict[str, float]:
    """Times of a dataset of so many pictures, in seconds, and in milliseconds where the name says so."""
    place = folder / f"pictures_{count}"
    if not place.is_dir():
        write(place, count)
    with torch.inference_mode(False), torch.enable_grad():
        found = measured(place, folder / f"cache_{count}")
    print(f"{count:7} pictures: " + ", ".join(f"{name} {value:g}" for name, value in found.items()), flush=True)
    return found


def write(place: Path, count: int):
    from PIL import Image

    place.mkdir(parents=True)
    random, kinds = np.random.default_rng(0), []
    for _ in range(KINDS):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "PNG")
        kinds.append(file.getvalue())
    for number in range(count):
        (place / f"{number:06}.png").write_bytes(kinds[number % KINDS] + number.to_bytes(4, "big"))
        (place / f"{number:06}.txt").write_text(f"zvk number {number}, red, blue, a house by the sea", encoding="utf-8")
    time.sleep(4)  # files that were just written are not taken for unchanged


@contextlib.contextmanager
def timed(found: dict[str, float], name: str) -> Iterator[None]:
    started = clock()
    yield
    found[name] = round(clock() - started, 4)


def measured(place: Path, cache: Path) -> dict[str, float]:
    from zturbo import dataset
    from zturbo.batches import pictures_of
    from zturbo.folder import look_through
    from zturbo.runs import Runs

    found: dict[str, float] = {}
    runs, read = Runs(cache), lambda: dataset.from_folder(place, (64,), "zvk", cache=Runs(cache).cache)
    with timed(found, "read"):
        dataset.from_folder(place, (64,), "zvk")
    read()
    with timed(found, "read again"):
        made = read()
    with timed(found, "listing"):
        look_through(place)
    host = open_host(runs.cache)
    for name, part in (("captions", made.captions), ("digest", made.digest)):
        with timed(found, name):
            part()
    fill(host, made)
    host = open_host(runs.cache)
    with timed(found, "encode"):
        trained = pictures_of(host.recipe, made, host)
    assert host.cache.made == 0, "everything is in the cache"
    with timed(found, "first step of an epoch"):
        trained.at(0, 0)
    with timed(found, "batch ms"):
        for index in range(1, 1 + STEPS):
            trained.at(0, index)
    found["batch ms"] = round(found["batch ms"] / STEPS * 1000, 4)
    found["start"], found["start, on the wall"] = start(made, runs)
    return found


def recipe_of():
    from zturbo.recipe import Compute, Network, Recipe, Saving, Turbo

    beside = {"turbo": Turbo(every=0), "saving": Saving(10**5)}
    return Recipe(name="scale", steps=1, network=Network(4, 4.0), compute=Compute("fp32"), **beside)


def open_host(cache: Path):
    from zturbo.hosts import comfy_load, comfy_tiny
    from zturbo.hosts.comfy import ComfyHost

    with torch.inference_mode():
        given = comfy_tiny.load_model(comfy_tiny.MODEL), comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE)
    return ComfyHost(*given, recipe_of(), cache=cache)


def fill(host, made):
    """Put a latent of each picture and features of each text into the cache. Nothing is flushed to the disk."""
    from zturbo import turbo
    from zturbo.hosts import comfy_cache

    autoencoder, text_encoder = comfy_cache.of_vae(host.vae), comfy_cache.of_clip(host.clip)
    latent, features = host._latent(made.items[0].pixels()), host._encoded("zvk")
    texts = (*made.captions().texts, *turbo.texts(host.recipe, made.trigger, host.turbo))
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        for item in made.items:
            host.cache.need(("latent", autoencoder, *item.key, False), lambda: latent)
        for text in texts:
            host.cache.need(("features", text_encoder, text), lambda: features)


def start(made, runs) -> tuple[float, float]:
    """(processor seconds, seconds on the wall) of a run until its first step is logged."""
    from zturbo import runs as conducting
    from zturbo.roles import Unattended

    class Control(Unattended):
        def begin(self, described): ...

        def end(self, how, saved): ...

        def step(self, event):
            ends.append((clock(), time.perf_counter()))

    ends: list[tuple[float, float]] = []
    host = open_host(runs.cache)
    started, on_the_wall = clock(), time.perf_counter()
    conducting.conduct(host.recipe, made, host, runs, "new", lambda run: Control(), KeyboardInterrupt)
    return round(ends[0][0] - started, 3), round(ends[0][1] - on_the_wall, 3)
