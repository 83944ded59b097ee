"""Feed thousands of damaged inputs to the pack's own code: each must end with a sentence or with a correct result.

`sentence`: a ZTurboError with one readable message. `correct`: a result that was checked. `other`: everything else:
another exception, seconds without an end, memory without a bound, a wrong result, and any file that was read or
written outside ComfyUI's folders. Input N is a function of the seed and N: `--only N` runs it again alone.

A kind of input is a function (rng, place) -> Damaged in the list KINDS of a module `fuzz_…`; `kinds` names the modules.
"""

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.fuzz_watch import Damaged, Hang, Place, Watch, alarm, bounded, most_memory

SECONDS = 8.0  # for one input
MEGABYTES = 1000.0  # that one input may take
GIGABYTES = 6.0  # of addresses, so that a fault costs no more than this process
Kind = Callable[[random.Random, Place], Damaged]


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench fuzz")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this input alone, and say what became of it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    from lab.setup import use_comfy

    use_comfy()
    numbers = range(args.inputs) if args.only is None else [args.only]
    ended = []
    for one in run(numbers, args.seed):
        ended.append(one)
        if one.verdict == "other" or args.only is not None:
            print(one, flush=True)
    for name in sorted({one.kind for one in ended}):
        print(f"{name:18} {dict(Counter(one.verdict for one in ended if one.kind == name))}")
    counts = Counter(one.verdict for one in ended)
    if args.json:
        print(
            json.dumps(
                {"inputs": len(ended), **{verdict: counts[verdict] for verdict in ("sentence", "correct", "other")}}
            )
        )
    return 1 if counts["other"] else 0


def kinds() -> list[Kind]:
    """All of them; imported late, as some need ComfyUI."""
    from bench import (
        fuzz_cache,
        fuzz_captions,
        fuzz_checkpoints,
        fuzz_importing,
        fuzz_names,
        fuzz_pictures,
        fuzz_sets,
        fuzz_tensors,
        fuzz_text,
    )

    modules = (
        fuzz_tensors,
        fuzz_checkpoints,
        fuzz_cache,
        fuzz_pictures,
        fuzz_captions,
        fuzz_text,
        fuzz_importing,
        fuzz_names,
        fuzz_sets,
    )
    return [kind for module in modules for kind in module.KINDS]


@dataclass(frozen=True)
class Ended:
    """What became of one input."""

    number: int
    kind: str
    seed: int
    damage: str
    verdict: str  # sentence, correct or other
    said: str

    def __str__(self) -> str:
        again = f"(--seed {self.seed} --only {self.number})"
        return f"{self.verdict}: input {self.number} {again}, {self.kind}: {self.damage}\n    {self.said}"


def run(numbers, seed: int) -> Iterator[Ended]:
    """Every input of these numbers in turn, the kinds one after the other."""
    every = kinds()
    with comfy_folders() as place, quiet(), bounded(GIGABYTES):
        watch = Watch(place)
        for number in numbers:
            kind = every[number % len(every)]
            place.clear()
            damaged = kind(random.Random(f"{seed} {number}"), place)
            verdict, said = judge(damaged, watch)
            yield Ended(number, kind.__name__, seed, damaged.what, verdict, said)


def judge(damaged: Damaged, watch: Watch) -> tuple[str, str]:
    """(verdict, what was said)."""
    from zturbo.errors import ZTurboError

    started, before = time.monotonic(), most_memory()
    try:
        with alarm(SECONDS), watch:
            damaged.feed()
        verdict, said = "correct", ""
    except ZTurboError as error:
        said = str(error)
        verdict = "sentence" if readable(said) else "other"
    except (Exception, Hang) as error:
        verdict, said = "other", f"{type(error).__name__}: {error}"
    faults = watch.taken()
    faults += [f"it took {time.monotonic() - started:.0f} s"] if time.monotonic() - started > SECONDS else []
    faults += [f"it took {most_memory() - before:.0f} MB"] if most_memory() - before > MEGABYTES else []
    return ("other", "; ".join([*faults, said])) if faults else (verdict, said)


def readable(said: str) -> bool:
    """A sentence: some words, all of them printable, of a length that fits a screen, with an end."""
    return said.isprintable() and len(said) <= 2000 and len(said.split()) >= 4 and said[-1] in ".!?…)"


@contextmanager
def comfy_folders() -> Iterator[Place]:
    """ComfyUI's folders in a fresh place, with canaries around them, while the context lasts."""
    import folder_paths

    before = {name: getattr(folder_paths, name) for name in ("input_directory", "output_directory", "temp_directory")}
    loras = folder_paths.folder_names_and_paths["loras"]
    place = Place(Path(tempfile.mkdtemp(prefix="fuzz-")).resolve())
    try:
        place.make()
        for name, folder in zip(before, (place.input, place.output, place.temp)):
            setattr(folder_paths, name, str(folder))
        folder_paths.folder_names_and_paths["loras"] = ([str(place.loras)], loras[1])
        yield place
    finally:
        for name, folder in before.items():
            setattr(folder_paths, name, folder)
        folder_paths.folder_names_and_paths["loras"] = loras
        shutil.rmtree(place.base, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and warnings that damaged files are worth."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
