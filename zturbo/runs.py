"""Runs from outside: which folder a recipe is trained in, how a run is conducted, what its LoRA says of itself.

Hosts and people differ (a node in ComfyUI, a command line); a run is the same everywhere.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from . import checkpoint, network, recipefile, roles, runlog, session, together, trainer, words
from .captions import tags_of
from .dataset import Dataset
from .errors import TrainingError, ZTurboError
from .filenames import file_name
from .recipe import Inputs, Previews, Recipe, teaches
from .runfolder import RECIPE, RunFolder, step_name, step_of
from .together import Together
from .world import ALONE, World

log = logging.getLogger("zturbo")
TRIGGER = "modelspec.trigger_phrase"  # of a LoRA's metadata
AUTO, NEW, ALL = "auto", "new", "all"
# of a prompt for another trainer or program
FLAG = re.compile(r"(?:^|\s)--(?:[whdslgn]|ar|seed|steps|neg)\b", re.IGNORECASE)


class Runs:
    """The folder in which run folders live. world: the processes that train one of them."""

    def __init__(self, root: Path, world: World = ALONE):
        self.root, self.world = root, world

    @property
    def cache(self) -> Path:
        """Where latents and text features are kept for all runs: a folder that no run can be named."""
        return self.root / ".cache"

    def folder(self, name: str) -> Path | None:
        """The run folder of exactly this name, if there is one."""
        return self.root / name if file_name(name) and own(self.root / name) else None

    def named(self, name: str) -> list[Path]:
        """The run folders of a name, oldest first: `name`, `name_2`, `name_3`, …"""
        if not file_name(name) or not self.root.is_dir():
            return []
        numbers = {
            path: path.name.removeprefix(name).removeprefix("_") or "1"
            for path in self.root.iterdir()
            if path.name == name or path.name.startswith(name + "_")
        }
        found = [
            path
            for path, number in numbers.items()
            if number.isascii() and number.isdecimal() and own(path) and name_of(path) in (name, "")
        ]
        return sorted(found, key=lambda path: int(numbers[path]))

    def checkpoint(self, name: str) -> Path:
        """The checkpoint file that `my_lora_2` (its newest) or `my_lora_2/step_000500` means.

        Raises ZTurboError when there is none.
        """
        run, _, step = name.strip().partition("/")
        folder = self.folder(run)
        if folder is None:
            raise ZTurboError(
                f"There is no run {run!r} in {self.root}. "
                "Give a folder's name from there (one without links in it), auto, or new."
            )
        found = {path.stem: path for path in RunFolder(folder).checkpoint_files()}
        if not found:
            raise ZTurboError(f"The run {run!r} has no checkpoint to go on from.")
        if step and step.removesuffix(".safetensors") not in found:
            raise ZTurboError(f"The run {run!r} has no checkpoint {step!r}; it has {', '.join(sorted(found))}.")
        return found[step.removesuffix(".safetensors")] if step else next(iter(found.values()))

    def loras(self, name: str) -> list[tuple[str, Path]]:
        """(name, file) of what a run has learnt: a LoRA's file, or a checkpoint's.

        `my_lora` or `my_lora/newest` is its newest LoRA, `my_lora/step_000500` a checkpoint, `my_lora/healthy` the
        newest LoRA with which turbo was not worn, `my_lora/all` every checkpoint, the oldest first, and the newest LoRA
        where it has learnt more. Raises ZTurboError.
        """
        run, _, which = name.strip().partition("/")
        folder = self.folder(run)
        if folder is None:
            raise ZTurboError(
                f"There is no LoRA {name!r} in models/loras, and no run {run!r} in {self.root}. Write the name of one."
            )
        there = RunFolder(folder)
        found = {f"{run}/{path.stem}": path for path in reversed(there.checkpoint_files())}
        steps = {step_of(path) for path in found.values()}
        named = {f"{run}/newest": there.lora} if there.saved_steps else {}
        if which == ALL:
            found |= {} if there.saved_steps in steps else named
        else:
            named |= {f"{run}/healthy": there.healthy} if there.healthy_step else {}
            wanted = f"{run}/{which or 'newest'}"
            found = {one: path for one, path in (found | named).items() if one == wanted}
        if not found:
            has = [*map(step_name, sorted(steps)), *(one.removeprefix(f"{run}/") for one in named)]
            raise ZTurboError(
                f"The run {run!r} has no {which or 'LoRA'}; it has {', '.join(has) or 'learnt nothing yet'}."
            )
        return list(found.items())


def own(run: Path) -> bool:
    """Is this a folder without links in it? It may be one itself, but what is written in it stays there.

    The pack makes no links, and a run that came from elsewhere may lead anywhere.
    """
    return run.is_dir() and not any(path.is_symlink() for path in run.rglob("*"))


def name_of(run: Path) -> str:
    """The name in a run's recipe, which the folder's begins with; nothing where it cannot be read."""
    try:
        first = (run / RECIPE).read_text(encoding="utf-8").splitlines()[0]
        name = json.loads(first.removeprefix("name = "))
        return name if isinstance(name, str) else ""
    except (OSError, ValueError, IndexError, RecursionError):
        return ""


class Host(roles.Host, Protocol):
    """What a run is conducted with."""

    way: str  # how the adapter is carried: branch or merged

    def carry(self, way: str) -> None: ...

    def warning(self) -> str:
        """What about the wiring is probably not meant, or nothing."""
        ...

    def describe(self) -> str:
        """One line for the log: what training runs on."""
        ...

    def digest(self) -> str:
        """Tells models and adapters apart."""
        ...

    def foresee(self, dataset: Dataset) -> None:
        """Raises ZTurboError, with the sum and a way out, where memory cannot hold the run."""
        ...

    def adapter_facts(self) -> dict[str, str]:
        """What the LoRA file says of the adapter, where there is one."""
        ...


class Control(roles.Control, Protocol):
    """The person at the screen, who also sees a run begin and end."""

    def begin(self, described: str) -> None: ...

    def end(self, how: str, saved: int) -> None:
        """how: finished, stopped, cancelled or failed; saved: steps that the LoRA on the disk has learnt."""
        ...


@dataclass
class Conducted:
    """A run that has ended well. facts: the LoRA file's metadata."""

    result: trainer.Result
    run: RunFolder
    facts: dict[str, str]


@dataclass(frozen=True)
class Given:
    """What a run is a function of.

    teaches: see the recipe's `teaches`, numbers and words only, so that the log gives them back alike; inputs: digest
    of pictures and model; source: the checkpoint that it goes on from, or nothing.
    """

    teaches: dict
    inputs: str
    source: str

    def same_as(self, start: dict) -> bool:
        """Is this what a run's start event says?"""
        return (
            self.teaches == start.get("teaches")
            and self.inputs == start.get("inputs")
            and (not self.source or self.source == start.get("source"))
        )

    def differs(self, start: dict) -> str:
        """In words, what a start event says that is another now, or that it does not say.

        For instance `had other settings (steps)`.
        """
        if not start.get("teaches") or not start.get("inputs"):
            return "has no log of what it was given"
        before, now = start["teaches"], self.teaches
        names = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        pictures = self.inputs.partition("-")[0] == start["inputs"].partition("-")[0]
        if names:
            return f"had other settings ({', '.join(names)})"
        return f"had {'another model or adapter, or the other host' if pictures else 'other pictures or captions'}"

    def refusal(self, folder: Path) -> str:
        """Why a run cannot be taken up with this, and what to do."""
        start = runlog.start_of(folder)
        back = "Set them back, or train" if start.get("teaches") and start.get("inputs") else "Train"
        new = f"a new run that goes on from its newest checkpoint (with {folder.name} in resume)"
        return f"it {self.differs(start)}. {back} {new}."


def conduct(
    recipe: Recipe,
    dataset: Dataset,
    host: Host,
    runs: Runs,
    resume: str | Path,
    control_of: Callable[[RunFolder], Control],
    cancelled: type[BaseException],
) -> Conducted:
    """Train in this process.

    Raises ZTurboError with a sentence, or `cancelled`; in both cases the LoRA so far is saved.
    resume: see `choose_run`. control_of: the person, once the run folder is known.
    """
    # what is wrong with these is said before a folder is made
    network.trainable_modules(host.targets, recipe.network, host.family.groups)
    host.start()
    given = Given(teaches(recipe), f"{dataset.digest()}-{host.digest()}", source_of(runs, resume))
    run, note = choose_run(recipe, given, runs, resume)
    run.world = runs.world
    if recipe.compute.adapter == AUTO:
        # as it was begun, whatever memory is free today
        host.carry(runlog.start_of(run.path).get("way") or host.way)
    foresee(recipe, dataset, host, run, given)
    control = control_of(run)
    log.info("%s Run folder: %s", host.describe(), run.path)
    run.forget_wishes()
    run.begin(total=recipe.steps, adapter=host.describe(), way=host.way, **vars(given))
    control.begin(host.describe())
    crowd = run.world.describe(recipe.batch_size * recipe.optimizer.accumulation)
    for sentence in filter(None, (note, crowd, host.warning(), dataset.doubt(), prompt_doubt(recipe))):
        session.tell(run, control, 0, sentence)
    ended = "failed"
    try:
        facts = metadata(recipe, dataset, host)
        result = trainer.train(recipe, dataset, host, run, Together(control, run.world), facts)
        ended = "stopped" if result.steps < recipe.steps else "finished"
    except cancelled:
        ended = "cancelled"
        log.info("Cancelled. %s", run.kept())
        raise
    except Exception as error:
        raise TrainingError(failure(error, recipe, host, run)) from error
    finally:
        run.event(event="end", how=ended, saved=run.saved_steps)
        run.release()
        control.end(ended, run.saved_steps)
    return Conducted(result, run, facts)


def follow(recipe: Recipe, dataset: Dataset, host: Host, world: World):
    """What `conduct` is in the processes beside the first one: they train with it, and write nothing.

    Raises ZTurboError.
    """
    network.trainable_modules(host.targets, recipe.network, host.family.groups)
    host.start()
    way = together.meet(world, teaches(recipe), f"{dataset.digest()}-{host.digest()}", "")
    if recipe.compute.adapter == AUTO:
        host.carry(way)
    host.foresee(dataset)
    run, control = together.FollowedRun(world), Together(roles.Unattended(), world)
    try:
        trainer.train(recipe, dataset, host, run, control, {})
    except Exception as error:
        raise TrainingError(failure(error, recipe, host, run)) from error


def foresee(recipe: Recipe, dataset: Dataset, host: Host, run: RunFolder, given: Given):
    """Refuse what memory cannot hold, and leave the folder again. A run that only hands on what it has needs none."""
    try:
        together.meet(run.world, given.teaches, given.inputs, host.way)
        if run.saved_steps < recipe.steps and not run.stop.exists():
            host.foresee(dataset)
    except BaseException:
        run.give_up()
        raise


def failure(error: Exception, recipe: Recipe, host: Host, run: RunFolder) -> str:
    """What the person reads: why training ended, what is kept, and what to do."""
    if isinstance(error, ZTurboError):
        return f"{error} {run.kept()}"
    if host.out_of_memory(error):
        host.save_memory()
        return f"There was not enough memory to train. {run.kept()} {less_memory(recipe)}"
    return f"Training ended with {type(error).__name__}: {error}. {run.kept()}"


def filled(recipe: Recipe, trigger: str) -> Recipe:
    """With the trigger word where prompts say `[trigger]`."""
    drawn, named = (
        tuple(words.filled(prompt, trigger) for prompt in prompts)
        for prompts in (recipe.previews.prompts, recipe.turbo.restore_prompts)
    )
    previews, turbo = replace(recipe.previews, prompts=drawn), replace(recipe.turbo, restore_prompts=named)
    return replace(recipe, previews=previews, turbo=turbo)


def prompt_doubt(recipe: Recipe) -> str:
    """What in the preview prompts is another trainer's way of writing and would be drawn as words."""
    for prompt in recipe.previews.prompts:
        if found := FLAG.search(prompt) or words.PLACE.search(prompt):
            odd = found[0].strip()
            why = (
                "there is no trigger word" if odd.startswith("[") else "size, steps and seed are settings of their own"
            )
            return f"A preview prompt has {odd} in it, which is drawn as words: {why}."
    return ""


def source_of(runs: Runs, resume: str | Path) -> str:
    """`run/step` of the checkpoint that a new run is to go on from; nothing for auto, new and a run itself.

    Raises ZTurboError when it is not there.
    """
    if isinstance(resume, Path) or resume in (AUTO, NEW):
        return ""
    path = runs.checkpoint(resume)
    return f"{path.parents[1].name}/{path.stem}"


def choose_run(recipe: Recipe, given: Given, runs: Runs, resume: str | Path) -> tuple[RunFolder, str]:
    """The run folder to work in, and a sentence where one that might have been expected is not taken up.

    resume: "auto" opens the newest run of this name that was given the same: one that was cancelled or whose process
    died goes on, one that was finished or stopped hands on what it has. "new" makes a new run. A run's name, or a
    name and a checkpoint (`my_lora_2/step_000500`), makes a new run that goes on from there, or opens the one that
    did so before. A run's path opens that one and no other. Raises ZTurboError for what is not there, or cannot go on.
    """
    called = [resume] if isinstance(resume, Path) else [] if resume == NEW else list(reversed(runs.named(recipe.name)))
    alike = [RunFolder(path) for path in called if given.same_as(runlog.start_of(path))]
    live = [run for run in alike if not run.take()]
    # taken up, it would begin anew and write over its LoRA
    lost = [run for run in alike if run not in live and run.saved_steps and not run.checkpoint_files()]
    whole = [run for run in alike if run not in live + lost]
    for run in [*lost, *whole[1:]]:
        run.release()
    if whole:
        return whole[0], take_up(whole[0], recipe, isinstance(resume, Path))
    without = f"{lost[0].path.name} has no checkpoint to go on from. {lost[0].kept()}" if lost else ""
    if unborn := blank(called[:1], given.source):
        log.info("The run folder %s is of a run that was cut off before it began: it is taken up.", unborn.path)
        unborn.stop.unlink(missing_ok=True)
        unborn.furnish(recipe)
        return begun(unborn, given, runs, resume), without and f"A new run begins: {without}"
    if isinstance(resume, Path):
        busy = "it is being trained right now, by another process."
        raise ZTurboError(f"The run {resume.name} cannot go on: {busy if live else without or given.refusal(resume)}")
    if given.source:
        checkpoint.read(runs.checkpoint(resume))  # before a folder is made
    run = begun(RunFolder.new(runs.root, recipe, taken=True), given, runs, resume)
    if called and not alike and not given.source and was_cut_off(called[0]):
        without = f"{called[0].name}, which was cut off, {given.differs(runlog.start_of(called[0]))}."
    return run, without and f"A new run begins: {without}"


def was_cut_off(folder: Path) -> bool:
    """Did a run end before its time, and is nobody training in it?"""
    return runlog.how_ended(folder) not in ("finished", "stopped") and not RunFolder(folder).is_live()


def blank(newest: list[Path], source: str) -> RunFolder | None:
    """The newest folder of a name, taken, where nothing has begun in it and no other process is about to."""
    run = RunFolder(newest[0]) if newest else None
    step = source.partition("/")[2]
    if run is None or not run.is_blank(step) or not run.take():
        return None
    if run.is_blank(step):
        return run
    run.release()
    return None


def begun(run: RunFolder, given: Given, runs: Runs, resume: str | Path) -> RunFolder:
    """A new run's folder with the checkpoint that it goes on from, where it does from one."""
    if given.source and not isinstance(resume, Path):
        try:
            run.adopt(runs.checkpoint(resume), **vars(given))
        except ZTurboError:
            run.give_up()
            raise
    return run


def take_up(run: RunFolder, recipe: Recipe, named: bool) -> str:
    """Make a run's folder ready to go on. Returns a sentence where it does not go on.

    named: by its path, which goes on with one that was stopped, too.
    """
    run.keep_recipe(recipe)
    log.info("The run %s was given the same settings and pictures: it is taken up again.", run.path)
    if not named and run.stop.exists() and runlog.how_ended(run.path) == "stopped":
        return (
            f"The run {run.path.name} was stopped at step {run.saved_steps}, and hands on what it has. "
            "To train on from there, name it in resume."
        )
    run.stop.unlink(missing_ok=True)
    return ""


def metadata(recipe: Recipe, dataset: Dataset, host: Host) -> dict[str, str]:
    """What the LoRA file says about itself: the fields that model browsers show, the recipe, the adapter. No paths."""
    facts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": host.family.architecture,
        "modelspec.title": recipe.name,
        TRIGGER: dataset.trigger,
        "modelspec.prediction_type": "rectified_flow",
        "modelspec.resolution": "{}x{}".format(*max(dataset.buckets(), key=math.prod)),
        "ss_output_name": recipe.name,
        "ss_base_model_version": host.family.base_version,
        "ss_network_module": {"lora": "networks.lora", "dora": "networks.lora"}.get(
            recipe.network.kind, "lycoris.kohya"
        ),
        "ss_network_dim": str(recipe.network.rank),
        "ss_network_alpha": f"{recipe.network.alpha:g}",
        "ss_learning_rate": f"{recipe.optimizer.learning_rate:g}",
        "ss_max_train_steps": str(recipe.steps),
        "ss_seed": str(recipe.seed),
        "ss_optimizer": recipe.optimizer.name,
        "ss_lr_scheduler": recipe.optimizer.schedule,
        "ss_batch_size_per_device": str(recipe.batch_size),
        "ss_num_train_images": str(sum(item.repeats for item in dataset.items)),
        "ss_tag_frequency": json.dumps({dataset.trigger or recipe.name: tag_counts(dataset)}, ensure_ascii=False),
        # prompts are the artist's own
        "zturbo.recipe": recipefile.to_toml(replace(recipe, previews=Previews(), inputs=Inputs())),
    }
    return facts | host.adapter_facts()


def tag_counts(dataset: Dataset) -> dict[str, int]:
    """How many pictures have each tag (what stands between commas) in their caption, the most frequent first."""
    counts = Counter(tag for item in dataset.items if not item.regularisation for tag in tags_of(item.caption))
    return dict(counts.most_common(200))


def less_memory(recipe: Recipe) -> str:
    """What this recipe can still give up, when one picture at a time with gradient checkpointing was too much."""
    ways = ["set compute_dtype to bf16"] if recipe.compute.dtype == "fp32" else []
    ways.append("lower the resolution of Image Dataset")
    return f"To need less: {', '.join(ways)}, or load an fp8 or int8 file of the model."
