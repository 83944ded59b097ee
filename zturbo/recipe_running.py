"""The parts of the recipe that say how a run goes: computing, adapter, turbo, previews, saving and inputs."""

from dataclasses import dataclass

from . import health
from .errors import ZTurboError
from .settings import SEEDS, STEPS, setting

MOST_RESTORED = 512  # prompts


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
        "Saves memory: what does not fit is computed twice, which takes longer (keep_layers says how much). Off: "
        "nothing is computed twice, whatever memory there is.",
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
    keep_layers: int = setting(
        -1,
        "Memory for speed, with gradient_checkpointing on: how many layers are kept instead of computed twice. -1: as "
        "many as fit. 0: as few as can be, for the least memory. What is learnt is the same.",
        low=-1,
        high=1000,
        unit="layers",
    )
    compile: str = setting(
        "auto",
        "Makes steps quicker on a card, by compiling; the first ones take longer. auto: on NVIDIA, AMD and Intel cards "
        "where Triton is installed. Where it fails, training goes on without, and says so.",
        choices=("auto", "on", "off"),
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


def _side(name: str):
    """A side of a preview."""
    tip = "Pixels. The tiny model: 128."
    return setting(1024, tip, low=16, high=8192, multiple=16, unit="pixels", name=name, widget=(64, 2048), step=16)


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
    width: int = _side("preview_width")
    height: int = _side("preview_height")
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
