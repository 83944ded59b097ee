"""The recipe: every setting of a run, with its default, unit, range and meaning. A run is a function of this and of its
pictures.

Frozen, so that nothing changes it in mid-run. A setting stands here and nowhere else: see `settings.setting`.
"""

from dataclasses import dataclass, field

from . import flow, health, settings
from .errors import ZTurboError
from .filenames import bad_name
from .settings import setting

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free", "lion", "came", "muon")
MASKS = ("files", "files and alpha", "off")
STEPS = (0, 100000)  # in a node's widget
SEEDS = (0, 0xFFFFFFFFFFFFFFFF)
MOST_RESTORED = 512  # prompts


@dataclass(frozen=True)
class Network:
    """The LoRA itself."""

    rank: int = setting(
        16,
        "Width of the LoRA. Usual: 8 to 32. On the full model the file has 5.3 MB a rank in bf16.",
        low=1,
        widget=(1, 512),
    )
    alpha: float = setting(
        16.0, "The LoRA is scaled by alpha / rank. Usual: the same as rank.", above=0, widget=(0.1, 1024), step=0.1
    )
    kind: str = setting(
        "lora",
        "lora: read everywhere. dora: with a length for each column, slower; read by ComfyUI. lokr: small files; read "
        "by ComfyUI and diffusers. loha: read by ComfyUI; slow, as it builds whole matrices.",
        choices=("lora", "dora", "lokr", "loha"),
    )
    factor: int = setting(
        8, "Of lokr only: size of its small matrix. Lower is a larger file. Usual: 4 to 16.", low=1, widget=(1, 64)
    )
    targets: str = setting(
        "",
        "Which parts are trained, with commas between: attention, feed_forward, adaln, or a pattern such as *.to_q. "
        "With :rank for a rank of its own (attention:32, feed_forward:8); the last that fits counts. Empty: all at the "
        "trainer's rank.",
    )
    layers: str = setting("", "Which of the 30 layers are trained, for example 0-9, 20. Empty: all.")
    start: str = setting(
        "",
        "A LoRA for Z-Image from models/loras to go on from, of any trainer, for kind lora (a DoRA for dora). Its rank "
        "may be at most the trainer's.",
        input="start_from",
    )


@dataclass(frozen=True)
class Optimizer:
    """How the LoRA moves."""

    name: str = setting(
        "adamw",
        "adamw: the safe choice. adamw8bit: less memory (needs bitsandbytes). adafactor: little memory. prodigy: finds "
        "its own rate, set learning_rate to 1. schedule_free: no schedule needed. lion: learning_rate about a third. "
        "came, muon. adafactor, prodigy, schedule_free, lion and came need the package pytorch-optimizer.",
        choices=OPTIMIZERS,
        name="optimizer",
    )
    learning_rate: float = setting(
        1e-4,
        "Per step. Usual: 1e-4; lower is safer and slower. The tiny model wants about 1e-3, the optimizer prodigy 1.",
        above=0,
        unit="per step",
        widget=(1e-7, 1),
        step=1e-6,
        round=False,
    )
    weight_decay: float = setting(
        0.0,
        "Pulls the LoRA towards nothing: this part, times the learning rate, goes at each step. Usual: 0 to 0.01.",
        low=0,
        unit="per step",
        widget=(0, 1),
        step=0.001,
        round=False,
    )
    max_grad_norm: float = setting(
        1.0,
        "A gradient longer than this (L2) is shortened to it. 0: never. Usual: 1.",
        low=0,
        unit="L2 norm",
        widget=(0, 100),
        step=0.1,
    )
    schedule: str = setting(
        "constant",
        "The learning rate's course behind the warm-up: constant, linear to 0, cosine to 0, or cosine_restarts: that "
        "several times over.",
        choices=("constant", "linear", "cosine", "cosine_restarts"),
    )
    warmup: int = setting(
        0, "Steps over which the learning rate rises from 0. Usual: 0 to 100.", low=0, unit="steps", widget=STEPS
    )
    restarts: int = setting(1, "Cycles of cosine_restarts, over the whole run.", low=1, unit="cycles", widget=(1, 100))
    decay: int = setting(
        0,
        "The last steps, over which the learning rate falls to 0. Usual: 0, or a tenth of the run.",
        low=0,
        unit="steps",
        widget=STEPS,
    )
    accumulation: int = setting(
        1,
        "Batches whose gradients make one step: a larger batch without more memory, in as many times the time.",
        low=1,
        unit="batches",
        widget=(1, 256),
    )
    ema: float = setting(
        0.0,
        "Moving average of the LoRA: the part that stays at each step. 0: off. Usual: 0.99. Where it is on, the "
        "average is what is previewed, saved and handed on.",
        unit="per step",
        widget=(0, 0.9999),
        step=0.0001,
        round=False,
    )

    def check(self):
        if self.name == "prodigy" and self.learning_rate < 0.01:
            raise ZTurboError(
                f"learning_rate is {self.learning_rate:g}, but prodigy finds its own rate and takes this as a factor "
                "on it. Set learning_rate to 1."
            )
        if not 0 <= self.ema < 1:
            raise ZTurboError(f"ema is {self.ema}; it must be 0 (off) or a number below 1, usually 0.99 to 0.999.")


@dataclass(frozen=True)
class Timesteps:
    """Which noise levels are trained."""

    density: str = setting(
        "weighted",
        "Which noise levels are trained most. weighted: the reference trainer's choice for Turbo. content: "
        "composition, high noise. style: texture, low noise. sigmoid: the middle. shift: as drawn at 1024. linear: "
        "all alike. logit_normal: see Timestep and Loss Options.",
        choices=flow.DENSITIES,
        input="timesteps",
    )
    mean: float = setting(
        0.0,
        "Of timesteps logit_normal, in logits: above 0 more noise, below 0 less.",
        unit="logits",
        widget=(-5, 5),
        step=0.1,
    )
    std: float = setting(
        1.0,
        "Of timesteps logit_normal, in logits: how wide it spreads. Usual: 1.",
        above=0,
        unit="logits",
        widget=(0.05, 5),
        step=0.05,
    )
    min_sigma: float = setting(
        0.0,
        "Lowest noise level, from 0 (picture) to 1 (noise); the timesteps chosen are squeezed in between. Usual: 0.",
        unit="sigma",
        widget=(0, 1),
        step=0.01,
    )
    max_sigma: float = setting(
        1.0,
        "Highest noise level, from 0 to 1; the timesteps chosen are squeezed in between. Usual: 1.",
        unit="sigma",
        widget=(0, 1),
        step=0.01,
    )

    def check(self):
        if not 0 <= self.min_sigma < self.max_sigma <= 1:
            raise ZTurboError(
                f"min_sigma is {self.min_sigma} and max_sigma {self.max_sigma}; they must be in order, between 0 and 1."
            )


@dataclass(frozen=True)
class Loss:
    """What is made small."""

    kind: str = setting(
        "mse",
        "mse: mean square error. huber: straight instead of square for large errors, so odd pictures pull less.",
        choices=("mse", "huber"),
        name="loss",
    )
    huber_delta: float = setting(
        0.1,
        "Where huber turns straight, in units of the velocity (about 1). Usual: 0.1.",
        above=0,
        unit="velocity",
        widget=(0.001, 10),
        step=0.01,
    )
    guidance: float = setting(
        0.0,
        "Differential guidance: the target is set this many times as far away. 0: off. Usual, when on: 3; learns "
        "faster and rougher.",
        low=0,
        unit="factor",
        widget=(0, 10),
        step=0.5,
    )
    weighting: str = setting(
        "auto",
        "How much each noise level counts in the loss. auto: as timesteps says. none: all alike. weighted: the "
        "reference trainer's curve. cosmap: the middle more. x0: by the square of the noise level, as core's trainer "
        "does.",
        choices=flow.WEIGHTINGS,
    )


@dataclass(frozen=True)
class Data:
    """What training does with pictures and captions; the pictures themselves come from the dataset."""

    caption_dropout: float = setting(
        0.05,
        "How often a picture's caption shrinks to the trigger word, 0 to 1: ties what is learnt to that word. Usual: "
        "0.05.",
        low=0,
        high=1,
        unit="share",
        step=0.01,
    )
    shuffle_tags: bool = setting(
        False, "For captions that are lists of tags with commas between: show them in changing order."
    )
    keep_tags: int = setting(
        1,
        "First tags that stay in front when tags are shuffled; a trigger word that was put in front is one of them.",
        low=0,
        unit="tags",
        widget=(0, 50),
    )
    flip: bool = setting(
        False, "Show pictures mirrored too. Not for faces, letters, or anything with a left and a right."
    )
    upscale: bool = setting(
        False, "Enlarge pictures that are smaller than resolution. Off: they are trained at their own size."
    )
    masks: str = setting(
        "files",
        "Which part of a picture counts. files: cat.mask.png or cat-masklabel.png beside cat.png, white where it "
        "counts. files and alpha: also the transparency of pictures that have one. off: none.",
        choices=MASKS,
    )
    outside: float = setting(
        0.1,
        "How much the loss counts outside a mask, against 1 inside. Usual: 0.1; at 0 the surroundings may become "
        "anything.",
        low=0,
        high=1,
        unit="factor",
        step=0.05,
    )
    regularisation_weight: float = setting(
        1.0,
        "Factor on the loss of regularisation pictures, 0 to 10. Usual: 1.",
        low=0,
        high=10,
        unit="factor",
        step=0.05,
    )
    validation: float = setting(
        0.0,
        "Share of the pictures that is not trained on but only looked at: when their loss rises again, the LoRA has "
        "begun to learn by heart. 0: none. Usual: 0.1 with 20 pictures or more.",
        low=0,
        high=0.5,
        unit="share",
        step=0.05,
    )
    validation_every: int = setting(
        100,
        "Steps between two such looks; each takes as long as about ten steps.",
        low=1,
        unit="steps",
        widget=(1, 100000),
    )
    cache: bool = setting(
        True,
        "Keep encoded pictures and captions in output/zturbo/.cache, so that the next run with them starts at once. "
        "The run's log says how much room it takes.",
    )


@dataclass(frozen=True)
class Compute:
    """How a step is computed; no effect on what is learnt beyond rounding."""

    dtype: str = setting(
        "bf16",
        "Of the computation; LoRA weights are always trained in fp32. fp32: about twice the memory and time.",
        choices=("bf16", "fp32"),
        input="compute_dtype",
    )
    checkpointing: bool = setting(
        True,
        "Much less memory for about a third more time. Off only where memory is plenty.",
        input="gradient_checkpointing",
    )
    adapter: str = setting(
        "auto",
        "How the adapter is carried while training. merged: patched into the weights, no extra work a step. branch: "
        "beside them, exact on fp8 and int8 models, no copy of the weights. auto picks and says which.",
        choices=("auto", "branch", "merged"),
        input="adapter_way",
    )
    repeat: str = setting(
        "exact",
        "On a GPU. exact: the same run gives the same bits each time, and a resumed one those of one that was never "
        "stopped. fast: takes quicker kernels that do not; what is learnt is as good. A CPU is always exact.",
        choices=("exact", "fast"),
    )


@dataclass(frozen=True)
class AdapterCourse:
    """How strong the de-distill adapter is over a run, as factors on the strength that the model carries."""

    start: float = setting(
        1.0,
        "Factor on the adapter's strength at the first step, 0 to 4. Usual: 1.",
        low=0,
        high=4,
        unit="factor",
        name="adapter_start",
        input="start",
        step=0.05,
    )
    end: float = setting(  # at the last step that trains pictures
        1.0,
        "Factor on the adapter's strength at the last step, 0 to 4; in between it changes evenly. Usual: 1.",
        low=0,
        high=4,
        unit="factor",
        name="adapter_end",
        input="end",
        step=0.05,
    )

    @property
    def changes(self) -> bool:
        return (self.start, self.end) != (1, 1)


@dataclass(frozen=True)
class Turbo:
    """How turbo is watched and kept, on prompts that have nothing to do with the pictures."""

    keep: str = setting(
        "off",
        "For long runs and high learning rates. guard: while it trains, the LoRA is held to leave pictures of "
        "unrelated prompts as they are; a guarded step computes four pictures more, of at most 512 pixels, and it "
        "learns less far. restore: the last steps (Turbo Health Options) train no pictures, but the LoRA to be itself "
        "where a prompt has the trigger word, and to leave turbo alone where none does.",
        choices=("off", "guard", "restore"),
        name="keep_turbo",
    )
    weight: float = setting(
        1.0,
        "Of keep_turbo's guard beside the loss, as a factor. Higher keeps more of turbo and learns more slowly. Usual: "
        "1.",
        above=0,
        unit="factor",
        name="guard_weight",
        widget=(0.001, 1000),
        step=0.1,
        round=False,
    )
    interval: int = setting(
        2,
        "Every how many steps one is guarded; 1: each. Higher is faster and keeps less. Usual: 2.",
        low=1,
        unit="steps",
        name="guard_interval",
        widget=(1, 100),
    )
    prompts: tuple[str, ...] = setting(
        health.PROMPTS,
        "Unrelated prompts, one a line, without the trigger word: the first 8 are the gauge's, the others "
        "keep_turbo's. What is near to your subject and must stay as it is belongs here, too.",
    )
    size: int = setting(
        0,
        "Pixels, width and height at which gauge, guard and restoring look. 0: the short side of your pictures, at "
        "most 512.",
        low=64,
        high=1024,
        multiple=16,
        off=0,
        unit="pixels",
        name="gauge_size",
        input="size",
        widget=(0, 1024),
        step=16,
    )
    every: int = setting(
        250,
        "Steps between two readings of the gauge. 0: none. One reading takes eight forward passes, as long as a few "
        "steps.",
        low=0,
        unit="steps",
        name="gauge_every",
        widget=STEPS,
    )
    stop_above: float = setting(
        0.0,
        "The run ends when the gauge reads more than this, 0 to 1, and hands on the LoRA of the reading before. 0: it "
        "never does. Usual, when on: 0.1 to 0.3.",
        low=0,
        high=1,
        unit="gauge",
        step=0.05,
    )
    restore_steps: int = setting(
        1000,
        "With keep_turbo at restore: the last steps of the run, in which no pictures are trained. Usual: half of the "
        "run. Each takes as long as a step of batch size 8.",
        low=1,
        unit="steps",
        widget=(1, 100000),
    )
    restore_prompts: tuple[str, ...] = setting(
        (),
        "With keep_turbo at restore: prompts with the trigger word, one a line, of the kind that you will draw with, "
        "20 or more. Your captions count, too. Empty: the trigger word in front of the unrelated prompts.",
    )

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

    def check(self):
        if self.stop_above and not (self.every and self.prompts):
            raise ZTurboError(
                f"stop_above is {self.stop_above:g} and needs readings of the gauge, but gauge_every is {self.every} "
                f"and there are {len(self.prompts)} unrelated prompts. Set gauge_every above 0 and write some prompts, "
                "one a line."
            )
        if self.keep != "off" and len(self.prompts) <= health.WATCHED:
            raise ZTurboError(
                f"keep_turbo is {self.keep} and there are {len(self.prompts)} unrelated prompts; it needs more than "
                f"{health.WATCHED}, since the first {health.WATCHED} are the gauge's. Write more, one a line."
            )
        if self.restores and self.stop_above:
            raise ZTurboError(
                "keep_turbo is restore, which mends turbo at the end, and stop_above is "
                f"{self.stop_above:g}, which would end the run before. Set stop_above to 0, or keep_turbo to off or "
                "guard."
            )
        if len(self.restore_prompts) > MOST_RESTORED:
            raise ZTurboError(
                f"There are {len(self.restore_prompts)} restore_prompts; restoring keeps turbo's path for each in "
                f"memory (4 MB at 512 pixels). Write at most {MOST_RESTORED}."
            )


@dataclass(frozen=True)
class Previews:
    """Pictures drawn while training, on the clean turbo model."""

    prompts: tuple[str, ...] = setting(
        (), "One prompt a line, drawn while training and at the end. Empty: no previews.", name="preview_prompts"
    )
    every: int = setting(
        250,
        "Steps between previews. 0: only at the end.",
        low=0,
        unit="steps",
        name="previews_every",
        input="preview_every",
        widget=STEPS,
    )
    width: int = setting(
        1024,
        "Pixels. The tiny model: 128.",
        low=16,
        high=8192,
        multiple=16,
        unit="pixels",
        name="preview_width",
        widget=(64, 2048),
        step=16,
    )
    height: int = setting(
        1024,
        "Pixels. The tiny model: 128.",
        low=16,
        high=8192,
        multiple=16,
        unit="pixels",
        name="preview_height",
        widget=(64, 2048),
        step=16,
    )
    steps: int = setting(8, "Sampler steps.", low=1, high=1000, unit="steps", name="preview_steps")
    seed: int = setting(
        0, "Picks the previews' noise, the same in every preview.", low=0, name="preview_seed", widget=SEEDS
    )
    sampler: str = setting("euler", "What draws them.", choices=("euler",))


@dataclass(frozen=True)
class Saving:
    """What is written into the run folder while training."""

    every: int = setting(
        250,
        "Steps between two checkpoints. A run that is cut off goes on from the newest.",
        low=1,
        unit="steps",
        name="save_every",
        input="every",
        widget=(1, 100000),
    )
    keep: int = setting(
        2,
        "Newest checkpoints that stay on the disk, beside one or two from about 100 and 200 steps ago, to fall back "
        "on. One has about six times the size of the LoRA in bf16.",
        low=1,
        unit="checkpoints",
        widget=(1, 1000),
    )
    dtype: str = setting(
        "bf16",
        "Of the LoRA's numbers, in the run folder and as handed on. bf16: half the size of fp32.",
        choices=("bf16", "fp16", "fp32"),
        name="save_dtype",
        input="dtype",
    )


@dataclass(frozen=True)
class Inputs:
    """Where a run without a graph finds what it trains and what on; a graph writes down what it knows. Nothing of it
    is a setting of training: what counts is what lies there."""

    model: str = setting("", "A safetensors file, a folder that holds a saved transformer, or tiny.")
    text_encoder: str = setting("", "A file or folder.")
    vae: str = setting("", "A file or folder.")
    tokenizer: str = setting("", "A folder. Empty: beside the text encoder, else the bundled one.")
    adapter: str = setting("", "The de-distill adapter's file, or tiny. Empty: straight on the model.")
    adapter_strength: float = setting(1.0, "How much of the adapter.", low=0, high=4, unit="factor")
    pictures: str = setting("", "A folder.")
    trigger: str = setting("", "A made-up word for what is taught.")
    resolutions: str = setting("1024", "Pixels, with commas between: 768, 1024.", unit="pixels")
    regularisation: str = setting("", "A folder. Empty: none.")

    def check(self):
        for name, text in vars(self).items():
            if isinstance(text, str) and any(c in text for c in "\a\b\f\n\r\t\v"):
                raise ZTurboError(
                    f"inputs.{name} is {text!r}, with a sign in it that no path has: in double quotes a backslash is "
                    "no backslash. Write the path in single quotes, or with /."
                )


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is a function of, and where its model and pictures lie. Raises ZTurboError for what is not
    allowed."""

    name: str = setting("my_lora", "Names the run's folder in output/zturbo. When it exists, _2, _3 … is added.")
    steps: int = setting(
        2000, "Optimizer steps. Usual: 500 to 3000; past that turbo wears off.", low=1, unit="steps", widget=(1, 100000)
    )
    batch_size: int = setting(
        1, "Pictures a step. Memory and time grow with it. Usual: 1 to 4.", low=1, unit="pictures", widget=(1, 64)
    )
    seed: int = setting(
        0, "Decides noise, order and the LoRA's start: the same seed gives the same LoRA.", low=0, widget=SEEDS
    )
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
        settings.check(self)
        for part in (self.optimizer, self.timesteps, self.turbo, self.inputs):
            part.check()
        self.check()

    def check(self):
        if self.turbo.guarded and self.adapter.changes:
            raise ZTurboError(
                "keep_turbo is guard, which holds the model with the whole adapter on, and the adapter's strength goes "
                f"from {self.adapter.start:g} to {self.adapter.end:g}. Take the adapter schedule away, or set "
                "keep_turbo to off or restore."
            )
        if self.turbo.restores and self.learning_steps < 1:
            raise ZTurboError(
                f"keep_turbo is restore with the last {self.turbo.restore_steps} of {self.steps} steps: nothing is "
                "left to train pictures in. Set steps higher, or restore_steps lower."
            )
        if self.compute.adapter == "merged" and self.beside:
            raise ZTurboError(
                "adapter_way is merged, but DoRA and an adapter schedule need the adapter beside the weights. Set "
                "adapter_way to auto or branch."
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


def teaches(recipe: Recipe) -> dict[str, object]:
    """The settings that decide what is learnt, where they are not the defaults: dotted name -> value. Two recipes with
    the same ones train the same LoRA."""
    given, default = settings.flat(recipe), settings.flat(Recipe())
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
