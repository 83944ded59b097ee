"""Settings of a run that most people leave alone: small nodes that plug into Train LoRA."""

import folder_paths
from comfy_api.latest import io

from ..zturbo.flow import WEIGHTINGS
from ..zturbo.health import PROMPTS
from ..zturbo.hosts import comfy_load
from ..zturbo.lorafile import DTYPES
from ..zturbo.recipe import (
    NETWORKS,
    OPTIMIZERS,
    SCHEDULES,
    AdapterCourse,
    Loss,
    Network,
    Optimizer,
    Saving,
    Timesteps,
    Turbo,
)
from .screen import lines
from .types import (
    CATEGORY,
    AdapterSchedule,
    HealthOptions,
    LossOptions,
    NetworkOptions,
    OptimizerOptions,
    SavingOptions,
)

NOTHING = "nothing"


class ZTurboNetworkOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboNetworkOptions",
            display_name="Network Options",
            category=CATEGORY,
            description="What Train LoRA trains: LoRA, DoRA, LoKr or LoHa, on which parts of the model, at which rank, and from which numbers it starts. Without this node: LoRA on every Linear of the 30 layers, from nothing.",
            search_aliases=["dora", "lokr", "loha", "lycoris", "target modules", "continue lora", "rank per layer"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(NETWORKS),
                    default="lora",
                    tooltip="lora: read everywhere. dora: with a length for each column, slower; read by ComfyUI. lokr: small files; read by ComfyUI and diffusers. loha: read by ComfyUI; slow, as it builds whole matrices.",
                ),
                io.Int.Input(
                    "factor",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Of lokr only: size of its small matrix. Lower is a larger file. Usual: 4 to 16.",
                ),
                io.String.Input(
                    "targets",
                    default="",
                    tooltip="Which parts are trained, with commas between: attention, feed_forward, adaln, or a pattern such as *.to_q. With :rank for a rank of its own (attention:32, feed_forward:8); the last that fits counts. Empty: all at the trainer's rank.",
                ),
                io.String.Input(
                    "layers", default="", tooltip="Which of the 30 layers are trained, for example 0-9, 20. Empty: all."
                ),
                io.Combo.Input(
                    "start_from",
                    options=[NOTHING, *folder_paths.get_filename_list("loras")],
                    default=NOTHING,
                    tooltip="A LoRA for Z-Image from models/loras to go on from, of any trainer, for kind lora (a DoRA for dora). Its rank may be at most the trainer's.",
                ),
            ],
            outputs=[NetworkOptions.Output(display_name="network_options")],
        )

    @classmethod
    def execute(cls, kind, factor, targets, layers, start_from) -> io.NodeOutput:
        return io.NodeOutput(
            Network(
                kind=kind,
                factor=factor,
                targets=targets.strip(),
                layers=layers.strip(),
                start="" if start_from == NOTHING else start_from,
            )
        )

    @classmethod
    def fingerprint_inputs(cls, start_from, **_):
        return (
            ""
            if start_from in (None, NOTHING)
            else comfy_load.fingerprint(folder_paths.get_full_path("loras", start_from))
        )


class ZTurboAdapterSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboAdapterSchedule",
            display_name="Adapter Schedule",
            category=CATEGORY,
            description="Lets the de-distill adapter grow weaker or stronger while Train LoRA runs. Without this node: the same strength from the first step to the last.",
            search_aliases=["adapter strength", "fade adapter"],
            inputs=[
                io.Float.Input(
                    "start",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Factor on the adapter's strength at the first step, 0 to 4. Usual: 1.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Factor on the adapter's strength at the last step, 0 to 4; in between it changes evenly. Usual: 1.",
                ),
            ],
            outputs=[AdapterSchedule.Output(display_name="adapter_schedule")],
        )

    @classmethod
    def execute(cls, start, end) -> io.NodeOutput:
        return io.NodeOutput(AdapterCourse(start, end))


class ZTurboOptimizerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboOptimizerOptions",
            display_name="Optimizer Options",
            category=CATEGORY,
            description="How Train LoRA moves the LoRA: optimizer, the learning rate's course over the run, gradient accumulation, and a moving average. Without this node: AdamW at a constant learning rate.",
            search_aliases=["adamw", "prodigy", "lion", "scheduler", "ema", "warmup"],
            inputs=[
                io.Combo.Input(
                    "optimizer",
                    options=list(OPTIMIZERS),
                    default="adamw",
                    tooltip="adamw: the safe choice. adamw8bit: less memory (needs bitsandbytes). adafactor: little memory. prodigy: finds its own rate, set learning_rate to 1. schedule_free: no schedule needed. lion: learning_rate about a third. came, muon. adafactor, prodigy, schedule_free, lion and came need the package pytorch-optimizer.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Pulls the LoRA towards nothing: this part, times the learning rate, goes at each step. Usual: 0 to 0.01.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="A gradient longer than this (L2) is shortened to it. 0: never. Usual: 1.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    tooltip="The learning rate's course behind the warm-up: constant, linear to 0, cosine to 0, or cosine_restarts: that several times over.",
                ),
                io.Int.Input(
                    "warmup",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="Steps over which the learning rate rises from 0. Usual: 0 to 100.",
                ),
                io.Int.Input(
                    "restarts", default=1, min=1, max=100, tooltip="Cycles of cosine_restarts, over the whole run."
                ),
                io.Int.Input(
                    "decay",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip="The last steps, over which the learning rate falls to 0. Usual: 0, or a tenth of the run.",
                ),
                io.Int.Input(
                    "accumulation",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Batches whose gradients make one step: a larger batch without more memory, in as many times the time.",
                ),
                io.Float.Input(
                    "ema",
                    default=0.0,
                    min=0.0,
                    max=0.9999,
                    step=0.0001,
                    round=False,
                    tooltip="Moving average of the LoRA: the part that stays at each step. 0: off. Usual: 0.99. Where it is on, the average is what is previewed, saved and handed on.",
                ),
            ],
            outputs=[OptimizerOptions.Output(display_name="optimizer_options")],
        )

    @classmethod
    def execute(
        cls, optimizer, weight_decay, max_grad_norm, schedule, warmup, restarts, decay, accumulation, ema
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Optimizer(
                optimizer,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                schedule=schedule,
                warmup=warmup,
                restarts=restarts,
                decay=decay,
                accumulation=accumulation,
                ema=ema,
            )
        )


class ZTurboLossOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboLossOptions",
            display_name="Timestep and Loss Options",
            category=CATEGORY,
            description="Which noise levels Train LoRA looks at, and how it measures what is wrong. Without this node: all noise levels, mean square error.",
            search_aliases=["huber", "logit normal", "sigma range", "differential guidance"],
            inputs=[
                io.Float.Input(
                    "mean",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.1,
                    tooltip="Of timesteps logit_normal, in logits: above 0 more noise, below 0 less.",
                ),
                io.Float.Input(
                    "std",
                    default=1.0,
                    min=0.05,
                    max=5.0,
                    step=0.05,
                    tooltip="Of timesteps logit_normal, in logits: how wide it spreads. Usual: 1.",
                ),
                io.Float.Input(
                    "min_sigma",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Lowest noise level, from 0 (picture) to 1 (noise); the timesteps chosen are squeezed in between. Usual: 0.",
                ),
                io.Float.Input(
                    "max_sigma",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Highest noise level, from 0 to 1; the timesteps chosen are squeezed in between. Usual: 1.",
                ),
                io.Combo.Input(
                    "loss",
                    options=["mse", "huber"],
                    default="mse",
                    tooltip="mse: mean square error. huber: straight instead of square for large errors, so odd pictures pull less.",
                ),
                io.Float.Input(
                    "huber_delta",
                    default=0.1,
                    min=0.001,
                    max=10.0,
                    step=0.01,
                    tooltip="Where huber turns straight, in units of the velocity (about 1). Usual: 0.1.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.5,
                    tooltip="Differential guidance: the target is set this many times as far away. 0: off. Usual, when on: 3; learns faster and rougher.",
                ),
                io.Combo.Input(
                    "weighting",
                    options=list(WEIGHTINGS),
                    default="auto",
                    tooltip="How much each noise level counts in the loss. auto: as timesteps says. none: all alike. weighted: the reference trainer's curve. cosmap: the middle more. x0: by the square of the noise level, as core's trainer does.",
                ),
            ],
            outputs=[LossOptions.Output(display_name="loss_options")],
        )

    @classmethod
    def execute(cls, mean, std, min_sigma, max_sigma, loss, huber_delta, guidance, weighting) -> io.NodeOutput:
        return io.NodeOutput(
            (
                Timesteps(mean=mean, std=std, min_sigma=min_sigma, max_sigma=max_sigma),
                Loss(loss, huber_delta, guidance, weighting),
            )
        )


class ZTurboSavingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboSavingOptions",
            display_name="Saving Options",
            category=CATEGORY,
            description="How often Train LoRA writes a checkpoint and the LoRA so far, how many checkpoints stay, and the number format of the LoRA. Without this node: every 250 steps, two stay, bf16.",
            search_aliases=["checkpoint", "save every", "keep"],
            inputs=[
                io.Int.Input(
                    "every",
                    default=250,
                    min=1,
                    max=100000,
                    tooltip="Steps between two checkpoints. A run that is cut off goes on from the newest.",
                ),
                io.Int.Input(
                    "keep",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="Newest checkpoints that stay on the disk, beside one or two from about 100 and 200 steps ago, to fall back on. One has about six times the size of the LoRA in bf16.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="bf16",
                    tooltip="Of the LoRA's numbers, in the run folder and as handed on. bf16: half the size of fp32.",
                ),
            ],
            outputs=[SavingOptions.Output(display_name="saving_options")],
        )

    @classmethod
    def execute(cls, every, keep, dtype) -> io.NodeOutput:
        return io.NodeOutput(Saving(every, keep, dtype))


class ZTurboHealthOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboHealthOptions",
            display_name="Turbo Health Options",
            category=CATEGORY,
            description="How Train LoRA watches turbo's wear and keeps turbo. The gauge compares turbo with the LoRA and clean turbo on prompts that have nothing to do with your pictures: 0 untouched, 1 broken. Without this node: a reading every 250 steps, and nothing ends the run.",
            search_aliases=["turbo gauge", "turbo guard", "early stopping", "damage", "blurry lora"],
            inputs=[
                io.Int.Input(
                    "gauge_every",
                    default=250,
                    min=0,
                    max=100000,
                    tooltip="Steps between two readings of the gauge. 0: none. One reading takes eight forward passes, as long as a few steps.",
                ),
                io.Float.Input(
                    "stop_above",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The run ends when the gauge reads more than this, 0 to 1, and hands on the LoRA of the reading before. 0: it never does. Usual, when on: 0.1 to 0.3.",
                ),
                io.Float.Input(
                    "guard_weight",
                    default=1.0,
                    min=0.001,
                    max=1000.0,
                    step=0.1,
                    round=False,
                    tooltip="Of keep_turbo's guard beside the loss, as a factor. Higher keeps more of turbo and learns more slowly. Usual: 1.",
                ),
                io.Int.Input(
                    "guard_interval",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="Every how many steps one is guarded; 1: each. Higher is faster and keeps less. Usual: 2.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=1024,
                    step=16,
                    tooltip="Pixels, width and height at which gauge, guard and restoring look. 0: the short side of your pictures, at most 512.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="\n".join(PROMPTS),
                    tooltip="Unrelated prompts, one a line, without the trigger word: the first 8 are the gauge's, the others keep_turbo's. What is near to your subject and must stay as it is belongs here, too.",
                ),
                io.Int.Input(
                    "restore_steps",
                    default=1000,
                    min=1,
                    max=100000,
                    tooltip="With keep_turbo at restore: the last steps of the run, in which no pictures are trained. Usual: half of the run. Each takes as long as a step of batch size 8.",
                ),
                io.String.Input(
                    "restore_prompts",
                    multiline=True,
                    default="",
                    tooltip="With keep_turbo at restore: prompts with the trigger word, one a line, of the kind that you will draw with, 20 or more. Your captions count, too. Empty: the trigger word in front of the unrelated prompts.",
                ),
            ],
            outputs=[HealthOptions.Output(display_name="health_options")],
        )

    @classmethod
    def execute(
        cls, gauge_every, stop_above, guard_weight, guard_interval, size, prompts, restore_steps, restore_prompts
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Turbo(
                weight=guard_weight,
                interval=guard_interval,
                prompts=lines(prompts),
                size=size,
                every=gauge_every,
                stop_above=stop_above,
                restore_steps=restore_steps,
                restore_prompts=lines(restore_prompts),
            )
        )
