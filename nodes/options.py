"""Settings of a run that most people leave alone: small nodes that plug into Train LoRA."""

from comfy_api.latest import io

from ..zturbo.recipe import OPTIMIZERS, SCHEDULES, Loss, Optimizer, Saving, Timesteps
from .types import CATEGORY, LossOptions, OptimizerOptions, SavingOptions


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
                    tooltip="adamw: the safe choice. adamw8bit: less memory (needs bitsandbytes). adafactor: little memory. prodigy: finds its own rate, set learning_rate to 1. schedule_free: no schedule needed. lion: learning_rate about a third. came, muon. prodigy, schedule_free, lion and came need the package pytorch-optimizer.",
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
                io.Float.Input("max_grad_norm", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="A gradient longer than this (L2) is shortened to it. 0: never. Usual: 1."),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    tooltip="The learning rate's course behind the warm-up: constant, linear to 0, cosine to 0, or cosine_restarts: that several times over.",
                ),
                io.Int.Input("warmup", default=0, min=0, max=100000, tooltip="Steps over which the learning rate rises from 0. Usual: 0 to 100."),
                io.Int.Input("restarts", default=1, min=1, max=100, tooltip="Cycles of cosine_restarts, over the whole run."),
                io.Int.Input("decay", default=0, min=0, max=100000, tooltip="The last steps, over which the learning rate falls to 0. Usual: 0, or a tenth of the run."),
                io.Int.Input("accumulation", default=1, min=1, max=256, tooltip="Batches whose gradients make one step: a larger batch without more memory, in as many times the time."),
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
    def execute(cls, optimizer, weight_decay, max_grad_norm, schedule, warmup, restarts, decay, accumulation, ema) -> io.NodeOutput:
        return io.NodeOutput(
            Optimizer(optimizer, weight_decay=weight_decay, max_grad_norm=max_grad_norm, schedule=schedule, warmup=warmup, restarts=restarts, decay=decay, accumulation=accumulation, ema=ema)
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
                io.Float.Input("mean", default=0.0, min=-5.0, max=5.0, step=0.1, tooltip="Of timesteps logit_normal, in logits: above 0 more noise, below 0 less."),
                io.Float.Input("std", default=1.0, min=0.05, max=5.0, step=0.05, tooltip="Of timesteps logit_normal, in logits: how wide it spreads. Usual: 1."),
                io.Float.Input("min_sigma", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="Lowest noise level, from 0 (picture) to 1 (noise). Usual: 0."),
                io.Float.Input("max_sigma", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Highest noise level, from 0 to 1. Usual: 1."),
                io.Combo.Input("loss", options=["mse", "huber"], default="mse", tooltip="mse: mean square error. huber: straight instead of square for large errors, so odd pictures pull less."),
                io.Float.Input("huber_delta", default=0.1, min=0.001, max=10.0, step=0.01, tooltip="Where huber turns straight, in units of the velocity (about 1). Usual: 0.1."),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.5,
                    tooltip="Differential guidance: the target is set this many times as far away. 0: off. Usual, when on: 3; learns faster and rougher.",
                ),
            ],
            outputs=[LossOptions.Output(display_name="loss_options")],
        )

    @classmethod
    def execute(cls, mean, std, min_sigma, max_sigma, loss, huber_delta, guidance) -> io.NodeOutput:
        return io.NodeOutput((Timesteps(mean=mean, std=std, min_sigma=min_sigma, max_sigma=max_sigma), Loss(loss, huber_delta, guidance)))


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
                io.Int.Input("every", default=250, min=1, max=100000, tooltip="Steps between two checkpoints. A run that is cut off goes on from the newest."),
                io.Int.Input("keep", default=2, min=1, max=1000, tooltip="Newest checkpoints that stay on the disk. One has about six times the size of the LoRA in bf16."),
                io.Combo.Input("dtype", options=["bf16", "fp16", "fp32"], default="bf16", tooltip="Of the LoRA's numbers, in the run folder and as handed on. bf16: half the size of fp32."),
            ],
            outputs=[SavingOptions.Output(display_name="saving_options")],
        )

    @classmethod
    def execute(cls, every, keep, dtype) -> io.NodeOutput:
        return io.NodeOutput(Saving(every, keep, dtype))
