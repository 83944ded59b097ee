"""train, resume and plan."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .. import buckets, dataset, keeping, lorafile, lowrank, memory, network, recipefile, runfolder, runlog, runs
from ..errors import ZTurboError
from ..family import Z_IMAGE
from ..keeping import Sizes
from ..lowrank import Target
from ..recipe import Recipe
from ..runs import AUTO, Runs
from ..world import PATIENCE, open_world
from . import headers, hosts
from .screen import Screen

STOPPED = 3
HEAD = 128  # numbers of an attention head of Z-Image, whose count is a little of a step's sum
PLAN = "what a recipe would do: pictures, buckets, sizes, memory; loads and starts nothing"
RECIPE = "a TOML file; without one, the defaults and what the options say"
SET = "a setting, as in TOML: --set steps=500 --set optimizer.learning_rate=2e-4 --set name='\"cat\"'"
RESUME = (
    "auto: take up the newest run of this name that was given the same; new; "
    "or a run, or RUN/step_000500, to go on from"
)
WAIT = "with many cards (torchrun, accelerate launch): how long a process waits for one that says nothing"
NO_PICTURES = (
    "inputs.pictures is empty: give --pictures, a folder of pictures with a .txt caption beside each. "
    "(Pictures that came through a graph's wire are not on the disk.)"
)


def add(commands):
    from . import command

    train = command(commands, "train", run_train, "train a LoRA by a recipe, or go on with one that was cut off")
    of_recipe(train)
    where = Path("zturbo_runs")
    train.add_argument("--runs", type=Path, default=where, metavar="FOLDER", help="where run folders live")
    train.add_argument("--resume", default=AUTO, metavar="HOW", help=RESUME)
    resume = command(commands, "resume", run_resume, "go on with a run that was stopped or cut off")
    resume.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    hosts.add_options(resume)
    for one in (train, resume):
        one.add_argument("--wait", type=float, default=PATIENCE, metavar="MINUTES", help=WAIT)
    plan = command(commands, "plan", run_plan, PLAN)
    of_recipe(plan)


def of_recipe(parser: argparse.ArgumentParser):
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help=RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET)
    group = parser.add_argument_group("pictures")
    group.add_argument("--pictures", metavar="FOLDER", help="pictures with a .txt caption beside each")
    group.add_argument("--trigger", metavar="WORD", help="the trigger word")
    group.add_argument("--resolutions", metavar="PIXELS", help='sides of the trained pictures, as "768, 1024"')
    group.add_argument("--regularisation", metavar="FOLDER", help="pictures of the kind at large")
    hosts.add_options(parser)


def recipe_of(args) -> Recipe:
    """The file's recipe with what the options say. Raises ZTurboError."""
    if args.recipe is not None and not args.recipe.is_file():
        raise ZTurboError(_no_recipe(args.recipe))
    found = recipefile.with_settings("", args.set) if args.recipe is None else recipefile.read(args.recipe, args.set)
    return replace(found, inputs=hosts.given(found.inputs, args))


def pictures_of(given: Recipe, runs: Runs | None = None) -> dataset.Dataset:
    inputs = given.inputs
    if not inputs.pictures:
        raise ZTurboError(NO_PICTURES)
    sides = buckets.read_sides(inputs.resolutions)
    if not sides:
        raise ZTurboError(_no_resolutions(inputs.resolutions))
    apart = inputs.regularisation or None
    return dataset.from_folder(
        inputs.pictures, sides, inputs.trigger, given.data, apart, cache=None if runs is None else runs.cache
    )


def run_train(args) -> int:
    given = recipe_of(args)
    return conduct(given, args.runs, args.resume, args)


def run_resume(args) -> int:
    folder = args.folder.resolve()
    if not is_run(folder):
        missing = f"there is no {runfolder.RECIPE} and {runlog.EVENTS} in it"
        raise ZTurboError(f"{args.folder} is no run folder: {missing}.")
    given = recipefile.read(folder / runfolder.RECIPE)
    return conduct(replace(given, inputs=hosts.given(given.inputs, args)), folder.parent, folder, args)


def is_run(folder: Path) -> bool:
    if not (folder / runfolder.RECIPE).is_file():
        return False
    return (folder / runlog.EVENTS).is_file() or runfolder.RunFolder(folder).is_blank()


def conduct(given: Recipe, folder: Path, resume: str | Path, args) -> int:
    """Train, in each of the processes that a launcher has started."""
    world = open_world(args.device, args.wait)
    try:
        with world.one_fate():
            return train_in(Runs(folder, world), given, resume, args)
    except ZTurboError:
        if world.speaks:
            raise
        return 1


def train_in(place: Runs, given: Recipe, resume: str | Path, args) -> int:
    if place.world.main:
        runs.source_of(place, resume)  # before anything is loaded
    hosts.need(given.inputs)
    pictures = pictures_of(given, place)
    if place.world.main and not args.json:
        print(pictures.report(), file=sys.stderr)
    given = runs.filled(given, pictures.trigger)
    host = hosts.open_host(hosts.choose(args, given.inputs), given, args, place.cache)
    if not place.world.main:
        runs.follow(given, pictures, host, place.world)
        return 0
    screen = lambda run: Screen(run, given.steps, args.json)
    done = runs.conduct(given, pictures, host, place, resume, screen, KeyboardInterrupt)
    if not args.json:
        print(f"The LoRA: {done.run.lora}")
    # launchers take anything but 0 for a failure, and end the other processes
    return 0 if done.result.steps >= given.steps or place.world.size > 1 else STOPPED


def run_plan(args) -> int:
    given = recipe_of(args)
    hosts.need(given.inputs, ())
    pictures = pictures_of(given)
    facts = planned(given, pictures, fast=hosts.may_be_comfy(args, given.inputs) and given.network.kind == "lora")
    if args.json:
        print(json.dumps(facts))
    else:
        lines = [f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()]
        print("\n".join([pictures.report(), *lines]))
    return 0


def planned(given: Recipe, pictures: dataset.Dataset, fast: bool) -> dict:
    """Counts and sizes, from the files' headers: no weight is loaded.

    training_mb: the LoRA, its gradients and the optimizer's state; step_mb, least_step_mb: what a step keeps of the
    largest pictures with the longest caption, where there is room for all of it, and where there is none. fast: by
    ComfyUI's code and a backward written out; an adapter beside the weights is not counted.
    Raises ZTurboError where model, adapter and recipe do not fit.
    """
    model, adapter = hosts.model_file(given.inputs), hosts.adapter_file(given.inputs)
    linears = [one.target for one in headers.matrices(model)]
    if adapter is not None:
        file = lorafile.read(adapter)
        lorafile.need_all(file.factors, list(file.leftover), adapter.name)
        lorafile.check_fit(file.factors, linears, adapter.name)
    layers = [target for target in linears if target.module.startswith(Z_IMAGE.trained)]
    start = network.read_start(network.start_file(given.network.start), layers) if given.network.start else None
    lora = network.create(layers, given.network, given.seed, start=start, norms=ones)
    parameters = lowrank.count(lora)
    held = pictures.held_out()
    groups: dict[tuple[int, int], int] = {}
    for number, item in enumerate(pictures.items):
        if number not in held:
            groups[item.size] = groups.get(item.size, 0) + item.repeats
    per_epoch = sum(-(-count // given.batch_size) for count in groups.values())
    shown = 2 if given.data.flip else 1
    latents = sum(math.prod(Z_IMAGE.latent(shown, *item.size)) * 4 for item in pictures.items)
    rounds = -(-given.steps // given.previews.every) if given.previews.every else 1  # the last step draws, too
    picture = memory.tokens(max(width * height for width, height in groups), max(pictures.captions().texts, key=len))
    step, least = step_bytes(given, layers, picture, fast)
    return {
        "steps": given.steps,
        "batches_per_epoch": per_epoch,
        "epochs": round(given.learning_steps * given.optimizer.accumulation / per_epoch, 2),
        "buckets": {f"{width}x{height}": count for (width, height), count in sorted(groups.items())},
        "network": network.describe(lora),
        "trained_numbers": parameters,
        "lora_mb": round(parameters * lorafile.DTYPES[given.saving.dtype].itemsize / 1e6, 2),
        "training_mb": round(memory.lora(given, parameters).size / 1e6, 2),
        "step_mb": round(step / 1e6, 2),
        "least_step_mb": round(least / 1e6, 2),
        "model_mb": round(sum(file.stat().st_size for file in headers.files(model)) / 1e6, 2),
        "cached_latents_mb": round(latents / 1e6, 2),
        "captions": len(pictures.captions().texts),
        "previews": len(given.previews.prompts) * rounds,
        "adapter": described(adapter, given.inputs.adapter_strength),
    }


def step_bytes(given: Recipe, layers: list[Target], picture: int, fast: bool) -> tuple[float, float]:
    """(with all kept and a whole batch at once, with nothing kept and one picture at a time). picture: its tokens."""
    wide = [target for target in layers if target.module.endswith("feed_forward.w1")]
    width, inner, depth = wide[0].in_features, wide[0].out_features, len(wide)
    size = 2 if given.compute.dtype == "bf16" else 4
    together, alone = (memory.together(given, picture, picture, at_once) for at_once in (None, 1))
    if not fast:
        whole = memory.activations(together, width, depth, size, checkpointing=False)
        return whole.size, memory.activations(alone, width, depth, size, checkpointing=True).size
    sizes = Sizes(depth, width, inner, -(-width // HEAD), 7 * given.network.rank, size)
    return keeping.plan(sizes, together, 0, depth).bytes, keeping.plan(sizes, alone, 0, 0).bytes


def ones(targets: list[Target]) -> dict[str, torch.Tensor]:
    """In the place of the lengths of a DoRA's columns, which only the weights tell: they are counted, not used."""
    return {part.name: torch.ones(1, target.in_features) for target in targets for part in target.parts}


def described(adapter: Path | None, strength: float) -> str:
    return "none: training straight on the model" if adapter is None else f"{adapter.name} at {strength:+g}"


def _no_recipe(path: Path) -> str:
    return f"There is no recipe {path}. Give the recipe.toml of a run, or leave it out and give options."


def _no_resolutions(given: str) -> str:
    return f"inputs.resolutions is {given!r}: give --resolutions, sides in pixels with commas between, as 768, 1024."
