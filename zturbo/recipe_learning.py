"""The parts of the recipe that say how the LoRA learns: network, optimizer, timesteps, loss and data."""

from dataclasses import dataclass

from . import flow
from .errors import ZTurboError
from .settings import STEPS, setting

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free", "lion", "came", "muon")
MASKS = ("files", "files and alpha", "off")


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
