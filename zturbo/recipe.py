"""The recipe: every setting of a run, validated, with units. A run is a function of this and of its pictures.

Frozen, so that nothing changes it in mid-run; written as TOML into the run folder.
"""

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import flow, health
from .errors import ZTurboError

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free", "lion", "came", "muon")
NETWORKS = ("lora", "dora", "lokr", "loha")
KEEPS = ("off", "guard", "restore")
REPEATS = ("exact", "fast")
MASKS = ("files", "files and alpha", "off")
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts")
MARKS = ("Mn", "Mc")  # vowels and accents of some writings are signs of their own
# what Windows takes for a device, with any ending
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])[ .]*(\..*)?", re.IGNORECASE)
KEYS = {  # what sentences call a setting, as its node does -> its key in a file, where that is another
    "keep_turbo": "turbo.keep", "guard_weight": "turbo.weight", "guard_interval": "turbo.interval", "gauge_every": "turbo.every", "gauge_size": "turbo.size",
    "adapter_way": "compute.adapter", "adapter_start": "adapter.start", "adapter_end": "adapter.end", "preview_seed": "previews.seed", "preview_steps": "previews.steps",
    "preview_width": "previews.width", "preview_height": "previews.height", "previews_every": "previews.every", "save_every": "saving.every", "save_dtype": "saving.dtype",
}  # fmt: skip
# as the first word
FIRST = {
    "dtype": "compute.dtype",
    "loss": "loss.kind",
    "optimizer": "optimizer.name",
    "kind": "network.kind",
    "adapter": "compute.adapter",
    "keep": "saving.keep",
}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Network:
    """The LoRA itself."""

    rank: int = 16  # width of the low-rank branch
    alpha: float = 16.0  # the branch is scaled by alpha / rank
    kind: str = "lora"  # one of NETWORKS
    factor: int = 8  # of LoKr: size of the small matrix
    targets: str = ""  # what is trained, as globs or group names with ranks: "attention:32, *.w1"; empty: all
    layers: str = ""  # which layers, "0-9, 20"; empty: all
    start: str = ""  # a LoRA file in models/loras to start from; empty: from nothing


@dataclass(frozen=True)
class Optimizer:
    """How the LoRA moves."""

    name: str = "adamw"  # one of OPTIMIZERS
    learning_rate: float = 1e-4  # per step; prodigy finds its own and wants 1
    weight_decay: float = 0.0  # per step, times the learning rate
    max_grad_norm: float = 1.0  # gradients are scaled down to this L2 norm; 0: never
    schedule: str = "constant"  # one of SCHEDULES
    warmup: int = 0  # steps over which the learning rate rises from 0
    restarts: int = 1  # cycles of cosine_restarts
    decay: int = 0  # last steps, over which the learning rate falls to 0
    accumulation: int = 1  # batches whose gradients make one step
    ema: float = 0.0  # part of the averaged LoRA that stays at each step, 0 to 1; 0: no average


@dataclass(frozen=True)
class Timesteps:
    """Which noise levels are trained."""

    density: str = "weighted"  # one of flow.DENSITIES
    mean: float = 0.0  # of logit_normal, in logits
    std: float = 1.0  # of logit_normal, in logits
    min_sigma: float = 0.0  # noise levels are drawn between these two; 0: picture
    max_sigma: float = 1.0  # 1: noise


@dataclass(frozen=True)
class Loss:
    """What is made small."""

    kind: str = "mse"  # mse or huber
    huber_delta: float = 0.1  # where the Huber loss turns from square to straight, in units of the velocity
    guidance: float = 0.0  # differential guidance: how many times the error the target lies away; 0 or 1: off
    weighting: str = "auto"  # of noise levels, one of flow.WEIGHTINGS


@dataclass(frozen=True)
class Data:
    """What training does with pictures and captions; the pictures themselves come from the dataset."""

    caption_dropout: float = 0.05  # how often a picture's caption shrinks to the trigger word, 0 to 1
    shuffle_tags: bool = False  # captions are lists of tags with commas between, in any order
    keep_tags: int = 1  # first tags that stay in front when tags are shuffled
    flip: bool = False  # show pictures mirrored, every other time by chance
    upscale: bool = False  # enlarge pictures that are smaller than the resolution
    masks: str = "files"  # one of MASKS: where a picture's mask comes from
    outside: float = 0.1  # weight of the loss outside a mask, 0 to 1
    regularisation_weight: float = 1.0  # factor on the loss of regularisation pictures
    validation: float = 0.0  # share of the pictures that is held out and only looked at, 0 to 0.5
    validation_every: int = 100  # steps between two looks
    cache: bool = True  # keep latents and text features on the disk for other runs


@dataclass(frozen=True)
class Compute:
    """How a step is computed; no effect on what is learnt beyond rounding."""

    dtype: str = "bf16"  # of activations: bf16 or fp32; LoRA weights and optimizer are always fp32
    checkpointing: bool = True  # recompute each layer in backward: less memory, about a third more time
    adapter: str = "auto"  # how the de-distill adapter is carried: branch, merged, or auto
    repeat: str = "exact"  # on a GPU, one of REPEATS: kernels that give the same bits each time, or faster ones


@dataclass(frozen=True)
class AdapterCourse:
    """How strong the de-distill adapter is over a run, as factors on the strength that the model carries."""

    start: float = 1.0  # at the first step
    end: float = 1.0  # at the last step that trains pictures; in between along a straight line

    @property
    def changes(self) -> bool:
        return (self.start, self.end) != (1, 1)


@dataclass(frozen=True)
class Turbo:
    """How turbo is watched and kept, on prompts that have nothing to do with the pictures."""

    keep: str = "off"  # one of KEEPS
    weight: float = 1.0  # of the guard beside the loss
    interval: int = 2  # every how many steps one is guarded
    prompts: tuple[str, ...] = health.PROMPTS  # the first 8 for the gauge, the others for the guard
    size: int = 0  # pixels, width and height of their pictures; 0: the short side of the training pictures, at most 512
    every: int = 250  # steps between two readings of the gauge; 0: none
    stop_above: float = 0.0  # the run ends when the gauge reads more, 0 to 1; 0: never
    restore_steps: int = 1000  # last steps of the run, with keep at restore: no pictures are trained in them
    # that name what is trained; empty: the trigger word in front of the unrelated ones
    restore_prompts: tuple[str, ...] = ()

    @property
    def guarded(self) -> bool:
        return self.keep == "guard"

    @property
    def restores(self) -> bool:
        return self.keep == "restore"

    @property
    def healthy(self) -> float:
        """What the gauge reads at most while turbo is healthy enough."""
        return self.stop_above or health.HEALTHY


@dataclass(frozen=True)
class Previews:
    """Pictures drawn while training, on the clean turbo model."""

    prompts: tuple[str, ...] = ()
    every: int = 250  # steps between previews; 0: none while training
    width: int = 1024  # pixels
    height: int = 1024  # pixels
    steps: int = 8  # sampler steps
    seed: int = 0
    sampler: str = "euler"


@dataclass(frozen=True)
class Saving:
    """What is written into the run folder while training."""

    every: int = 250  # steps between two checkpoints, each with the LoRA so far
    keep: int = 2  # newest checkpoints that stay, beside one or two to fall back on
    dtype: str = "bf16"  # of the LoRA file: bf16, fp16 or fp32


@dataclass(frozen=True)
class Inputs:
    """Where a run without a graph finds what it trains and what on; a graph writes down what it knows. Nothing of it is a setting: what counts is what lies there."""

    model: str = ""  # a safetensors file, a folder that holds a saved transformer, or tiny
    text_encoder: str = ""  # a file or folder
    vae: str = ""  # a file or folder
    tokenizer: str = ""  # a folder; empty: beside the text encoder, else the bundled one
    adapter: str = ""  # the de-distill adapter's file, or tiny; empty: straight on the model
    adapter_strength: float = 1.0
    pictures: str = ""  # a folder
    trigger: str = ""
    resolutions: str = "1024"  # pixels, "768, 1024"
    regularisation: str = ""  # a folder; empty: none


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is a function of, and where its model and pictures lie."""

    name: str = "my_lora"
    steps: int = 2000  # optimizer steps
    batch_size: int = 1  # pictures a step
    seed: int = 0
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    optimizer: Optimizer = field(default_factory=Optimizer)
    timesteps: Timesteps = field(default_factory=Timesteps)
    loss: Loss = field(default_factory=Loss)
    compute: Compute = field(default_factory=Compute)
    adapter: AdapterCourse = field(default_factory=AdapterCourse)
    turbo: Turbo = field(default_factory=Turbo)
    previews: Previews = field(default_factory=Previews)
    saving: Saving = field(default_factory=Saving)
    inputs: Inputs = field(default_factory=Inputs)

    def __post_init__(self):
        check_types(self)
        at_least(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            save_every=self.saving.every,
            keep=self.saving.keep,
            rank=self.network.rank,
        )
        at_least(0, seed=self.seed, previews_every=self.previews.every, max_grad_norm=self.optimizer.max_grad_norm)
        above_zero(learning_rate=self.optimizer.learning_rate, alpha=self.network.alpha)
        at_least(1, restarts=self.optimizer.restarts, accumulation=self.optimizer.accumulation)
        at_least(
            0,
            warmup=self.optimizer.warmup,
            decay=self.optimizer.decay,
            weight_decay=self.optimizer.weight_decay,
            guidance=self.loss.guidance,
        )
        above_zero(std=self.timesteps.std, huber_delta=self.loss.huber_delta)
        one_of(flow.DENSITIES, density=self.timesteps.density)
        one_of(OPTIMIZERS, optimizer=self.optimizer.name)
        if self.optimizer.name == "prodigy" and self.optimizer.learning_rate < 0.01:
            raise ZTurboError(
                f"learning_rate is {self.optimizer.learning_rate:g}, but prodigy finds its own rate and takes this as a factor on it. Set learning_rate to 1."
            )
        one_of(SCHEDULES, schedule=self.optimizer.schedule)
        one_of(("mse", "huber"), loss=self.loss.kind)
        one_of(flow.WEIGHTINGS, weighting=self.loss.weighting)
        one_of(NETWORKS, kind=self.network.kind)
        one_of(MASKS, masks=self.data.masks)
        at_least(1, factor=self.network.factor, validation_every=self.data.validation_every)
        between(0, 1, caption_dropout=self.data.caption_dropout, outside=self.data.outside)
        between(0, 0.5, validation=self.data.validation)
        between(0, 10, regularisation_weight=self.data.regularisation_weight)
        between(0, 4, adapter_strength=self.inputs.adapter_strength)
        between(0, 4, adapter_start=self.adapter.start, adapter_end=self.adapter.end)
        if not 0 <= self.timesteps.min_sigma < self.timesteps.max_sigma <= 1:
            raise ZTurboError(
                f"min_sigma is {self.timesteps.min_sigma} and max_sigma {self.timesteps.max_sigma}; they must be in order, between 0 and 1."
            )
        at_least(0, keep_tags=self.data.keep_tags)
        at_least(0, preview_seed=self.previews.seed)
        between(1, 1000, preview_steps=self.previews.steps)
        one_of(("euler",), sampler=self.previews.sampler)
        for side, pixels in (("preview_width", self.previews.width), ("preview_height", self.previews.height)):
            if not 16 <= pixels <= 8192 or pixels % 16:
                raise ZTurboError(f"{side} is {pixels}; it must be a multiple of 16 from 16 to 8192.")
        one_of(KEEPS, keep_turbo=self.turbo.keep)
        above_zero(guard_weight=self.turbo.weight)
        at_least(1, guard_interval=self.turbo.interval)
        at_least(0, gauge_every=self.turbo.every)
        at_least(1, restore_steps=self.turbo.restore_steps)
        between(0, 1, stop_above=self.turbo.stop_above)
        if self.turbo.size and not (64 <= self.turbo.size <= 1024 and self.turbo.size % 16 == 0):
            raise ZTurboError(f"gauge_size is {self.turbo.size}; it must be 0, or a multiple of 16 from 64 to 1024.")
        if self.turbo.stop_above and not (self.turbo.every and self.turbo.prompts):
            raise ZTurboError(
                f"stop_above is {self.turbo.stop_above:g} and needs readings of the gauge, but gauge_every is {self.turbo.every} and there are {len(self.turbo.prompts)} unrelated prompts. Set gauge_every above 0 and write some prompts, one a line."
            )
        if self.turbo.keep != "off" and len(self.turbo.prompts) <= health.WATCHED:
            raise ZTurboError(
                f"keep_turbo is {self.turbo.keep} and there are {len(self.turbo.prompts)} unrelated prompts; it needs more than {health.WATCHED}, since the first {health.WATCHED} are the gauge's. Write more, one a line."
            )
        if self.turbo.restores and self.turbo.stop_above:
            raise ZTurboError(
                f"keep_turbo is restore, which mends turbo at the end, and stop_above is {self.turbo.stop_above:g}, which would end the run before. Set stop_above to 0, or keep_turbo to off or guard."
            )
        if self.turbo.guarded and self.adapter.changes:
            raise ZTurboError(
                f"keep_turbo is guard, which holds the model with the whole adapter on, and the adapter's strength goes from {self.adapter.start:g} to {self.adapter.end:g}. Take the adapter schedule away, or set keep_turbo to off or restore."
            )
        if len(self.turbo.restore_prompts) > 512:
            raise ZTurboError(
                f"There are {len(self.turbo.restore_prompts)} restore_prompts; restoring keeps turbo's path for each in memory (4 MB at 512 pixels). Write at most 512."
            )
        if self.turbo.restores and self.learning_steps < 1:
            raise ZTurboError(
                f"keep_turbo is restore with the last {self.turbo.restore_steps} of {self.steps} steps: nothing is left to train pictures in. Set steps higher, or restore_steps lower."
            )
        if not 0 <= self.optimizer.ema < 1:
            raise ZTurboError(
                f"ema is {self.optimizer.ema}; it must be 0 (off) or a number below 1, usually 0.99 to 0.999."
            )
        one_of(("bf16", "fp32"), dtype=self.compute.dtype)
        one_of(("bf16", "fp16", "fp32"), save_dtype=self.saving.dtype)
        one_of(("auto", "branch", "merged"), adapter=self.compute.adapter)
        one_of(REPEATS, repeat=self.compute.repeat)
        if self.compute.adapter == "merged" and self.beside:
            raise ZTurboError(
                "adapter_way is merged, but DoRA and an adapter schedule need the adapter beside the weights. Set adapter_way to auto or branch."
            )
        if sentence := bad_name(self.name):
            raise ZTurboError(sentence)

    @property
    def learning_steps(self) -> int:
        """Steps in which pictures are trained."""
        return self.steps - self.turbo.restore_steps if self.turbo.restores else self.steps

    @property
    def beside(self) -> bool:
        """Must the adapter be carried beside the weights?"""
        return self.network.kind == "dora" or self.adapter.changes


def check_types(settings, where: str = ""):
    """Raise ZTurboError for a value of another type than its field's, and for a number that no file can hold."""
    for one in dataclasses.fields(settings):
        name, value = where + one.name, getattr(settings, one.name)
        if dataclasses.is_dataclass(one.type):
            if type(value) is not one.type:
                raise ZTurboError(f"{name} is {shown(value)}; it must be a section, [{name}], with keys of its own.")
            check_types(value, f"{name}.")
        elif one.type not in KINDS:
            if not (isinstance(value, (tuple, list)) and all(isinstance(word, str) for word in value)):
                raise ZTurboError(f"{name} is {shown(value)}; it must be a list of texts.")
        elif not isinstance(value, (int, float) if one.type is float else one.type) or (
            isinstance(value, bool) and one.type is not bool
        ):
            raise ZTurboError(f"{name} is {shown(value)}; it must be {KINDS[one.type]}.")
        elif isinstance(value, (int, float)) and not (
            math.isfinite(value) if isinstance(value, float) else abs(value) < 2**64
        ):
            raise ZTurboError(f"{name} is {shown(value)}; it must be {KINDS[one.type]} of at most 64 bits, and finite.")
        for text in (value,) if isinstance(value, str) else value if isinstance(value, (tuple, list)) else ():
            if where == "inputs." and any(c in text for c in "\a\b\f\n\r\t\v"):
                raise ZTurboError(
                    f"{name} is {shown(text)}, with a sign in it that no path has: in double quotes a backslash is no backslash. Write the path in single quotes, or with /."
                )
            if not is_text(text):
                raise ZTurboError(
                    f"{name} is {shown(text)}; it has half a character in it (a cut emoji). Write it anew."
                )


def is_text(text: str) -> bool:
    """Can it be written into a file? Half of a surrogate pair cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def shown(value) -> str:
    """A value as a sentence quotes it."""
    try:
        return repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def at_least(low: float, **values):
    for name, value in values.items():
        if not value >= low:
            raise ZTurboError(f"{name} is {value}; it must be at least {low}.")


def above_zero(**values):
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ZTurboError(f"{name} is {value}; it must be a number above 0.")


def between(low: float, high: float, **values):
    for name, value in values.items():
        if not low <= value <= high:
            raise ZTurboError(f"{name} is {value}; it must be from {low} to {high}.")


def one_of(choices: tuple[str, ...], **values):
    for name, value in values.items():
        if value not in choices:
            raise ZTurboError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def file_name(name: str) -> bool:
    """True for one plain path component that every system accepts, with an ending of 20 characters behind it."""
    plain = (
        bool(name)
        and len(name) <= 100
        and name[0].isalnum()
        and name[-1] not in ". "
        and all(c.isalnum() or c in " ._-" or unicodedata.category(c) in MARKS for c in name)
    )
    return plain and len(name.encode()) <= 200 and not DEVICES.fullmatch(name)


def bad_name(name: str) -> str:
    """What is wrong with a name that cannot be a file name, or nothing."""
    return (
        ""
        if file_name(name)
        else f"The name {name!r} cannot be a file name. Use up to 100 letters, digits, spaces and . _ - only, start with a letter or digit, and none of Windows' devices (con, nul, com1 …)."
    )


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML 1.0; sections are the nested dataclasses."""
    values = dataclasses.asdict(recipe)
    plain = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for section, body in values.items():
        if isinstance(body, dict):
            plain += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in body.items())]
    return "\n".join(plain) + "\n"


def teaches(recipe: Recipe) -> dict[str, object]:
    """The settings that decide what is learnt, where they are not the defaults: dotted name -> value. Two recipes with the same ones train the same LoRA."""
    given, default = flat(recipe), flat(Recipe())
    idle = ["name", "inputs.", "previews.", "saving.", "compute.repeat", "data.cache", "data.validation_every"]
    idle += [] if recipe.turbo.stop_above else ["turbo.every"]
    idle += [] if recipe.turbo.stop_above or recipe.turbo.keep != "off" else ["turbo."]
    idle += [] if recipe.turbo.guarded else ["turbo.weight", "turbo.interval"]
    idle += [] if recipe.turbo.restores else ["turbo.restore_"]
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if value != default[key] and not key.startswith(tuple(idle))
    }


def flat(recipe: Recipe) -> dict[str, object]:
    """Dotted name -> value, over the whole recipe."""
    found: dict[str, object] = {}
    for name, value in dataclasses.asdict(recipe).items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _toml(value) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, (bool, str)):
        # JSON's escapes are TOML's, which has one more
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def from_toml(text: str) -> Recipe:
    """The recipe that `to_toml` wrote. Raises ZTurboError for what is no TOML, an unknown key, and a value that is not allowed."""
    return with_settings(text, ())


def with_settings(text: str, settings: Sequence[str]) -> Recipe:
    """A recipe's TOML with settings of the form `steps=500` or `optimizer.learning_rate=2e-4`; what is no TOML value is text. Raises ZTurboError."""
    values = read_toml(text, "The recipe", "Mend that line, or take the recipe.toml of a run.")
    for setting in settings:
        key, equals, value = setting.partition("=")
        *sections, name = key.strip().split(".")
        if not equals or not all((*sections, name)):
            raise ZTurboError(
                f"{setting!r} is no setting. Write KEY=VALUE, as steps=500 or optimizer.learning_rate=2e-4."
            )
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ZTurboError(f"{setting!r}: {section} is no section.")
        try:
            place[name] = read_toml(f"value = {value.strip()}", "", "")["value"]
        except ZTurboError:
            place[name] = value.strip()
    try:
        return _build(Recipe, values, "")
    except ZTurboError as error:
        raise ZTurboError(by_key(str(error))) from error


def by_key(sentence: str) -> str:
    """The sentence with settings called by their keys in the file."""
    given = flat(Recipe())
    sections: dict[str, list[str]] = {}
    for key in given:
        sections.setdefault(key.rpartition(".")[2], []).append(key)
    single = {name: keys[0] for name, keys in sections.items() if len(keys) == 1 and "." in keys[0]}
    first, _, rest = sentence.partition(" ")
    head = {**single, **FIRST}.get(first, first) if rest.startswith("is ") else first
    known = {name: key for name, key in {**single, **KEYS}.items() if "_" in name}
    return re.sub(r"(?<![\w.'])(" + "|".join(known) + r")\b(?!')", lambda found: known[found[0]], f"{head} {rest}")


def read_toml(text: str, what: str, advice: str) -> dict:
    try:
        import tomllib  # Python 3.11
    except ModuleNotFoundError:
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ModuleNotFoundError as error:
            raise ZTurboError("Reading a recipe needs Python 3.11, or the package tomli: pip install tomli.") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        path = (
            " A Windows path stands in single quotes, or is written with /."
            if re.search(r'"[A-Za-z]:\\|"\\\\', text)
            else ""
        )
        raise ZTurboError(f"{what} is not TOML ({error}). {advice}{path}") from error


def _build(kind, values: dict, where: str):
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ZTurboError(
                f"The recipe has an unknown key {where + key!r}, which is {shown(values[key])}. Known here: {', '.join(known)}."
            )
    built = {}
    for key, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(known[key]):
            built[key] = _build(known[key], value, f"{where}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool) and known[key] is float and abs(value) < 2**64:
            built[key] = float(value)
        else:
            built[key] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def read(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with settings as `with_settings` takes them. Raises ZTurboError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ZTurboError(
            f"The recipe {path.name} cannot be read as UTF-8 text ({error}). Take the recipe.toml of a run."
        ) from error
    return with_settings(text, settings)
