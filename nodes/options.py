"""Settings of a run that most people leave alone: small nodes that plug into Train LoRA."""

import folder_paths
from comfy_api.latest import io

from ..zturbo.recipe import AdapterCourse, Loss, Network, Optimizer, Saving, Timesteps, Turbo
from . import inputs
from .types import (
    CATEGORY,
    AdapterSchedule,
    HealthOptions,
    LossOptions,
    NetworkOptions,
    OptimizerOptions,
    SavingOptions,
    fingerprint_of,
)

NOTHING = "nothing"


class ZTurboNetworkOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboNetworkOptions",
            display_name="Network Options",
            category=CATEGORY,
            description=(
                "What Train LoRA trains: LoRA, DoRA, LoKr or LoHa, on which parts of the model, at which rank, and "
                "from which numbers it starts. Without this node: LoRA on every Linear of the 30 layers, from nothing."
            ),
            search_aliases=["dora", "lokr", "loha", "lycoris", "target modules", "continue lora", "rank per layer"],
            inputs=[
                *inputs.of(Network, "kind", "factor", "targets", "layers"),
                io.Combo.Input(
                    "start_from",
                    options=[NOTHING, *folder_paths.get_filename_list("loras")],
                    default=NOTHING,
                    tooltip=inputs.sentence(Network, "start"),
                ),
            ],
            outputs=[NetworkOptions.Output(display_name="network_options")],
        )

    @classmethod
    def execute(cls, targets, layers, start_from, **given) -> io.NodeOutput:
        return io.NodeOutput(
            Network(
                targets=targets.strip(),
                layers=layers.strip(),
                start="" if start_from == NOTHING else start_from,
                **inputs.values(Network, given),
            )
        )

    @classmethod
    def fingerprint_inputs(cls, start_from, **_):
        return fingerprint_of(start_from, NOTHING)


class ZTurboAdapterSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboAdapterSchedule",
            display_name="Adapter Schedule",
            category=CATEGORY,
            description=(
                "Lets the de-distill adapter grow weaker or stronger while Train LoRA runs. Without this node: the "
                "same strength from the first step to the last."
            ),
            search_aliases=["adapter strength", "fade adapter"],
            inputs=inputs.of(AdapterCourse, "start", "end"),
            outputs=[AdapterSchedule.Output(display_name="adapter_schedule")],
        )

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(AdapterCourse(**inputs.values(AdapterCourse, given)))


class ZTurboOptimizerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboOptimizerOptions",
            display_name="Optimizer Options",
            category=CATEGORY,
            description=(
                "How Train LoRA moves the LoRA: optimizer, the learning rate's course over the run, gradient "
                "accumulation, and a moving average. Without this node: AdamW at a constant learning rate."
            ),
            search_aliases=["adamw", "prodigy", "lion", "scheduler", "ema", "warmup"],
            inputs=inputs.of(
                Optimizer,
                "name",
                "weight_decay",
                "max_grad_norm",
                "schedule",
                "warmup",
                "restarts",
                "decay",
                "accumulation",
                "ema",
            ),
            outputs=[OptimizerOptions.Output(display_name="optimizer_options")],
        )

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(Optimizer(**inputs.values(Optimizer, given)))


class ZTurboLossOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboLossOptions",
            display_name="Timestep and Loss Options",
            category=CATEGORY,
            description=(
                "Which noise levels Train LoRA looks at, and how it measures what is wrong. Without this node: all "
                "noise levels, mean square error."
            ),
            search_aliases=["huber", "logit normal", "sigma range", "differential guidance"],
            inputs=[
                *inputs.of(Timesteps, "mean", "std", "min_sigma", "max_sigma"),
                *inputs.of(Loss, "kind", "huber_delta", "guidance", "weighting"),
            ],
            outputs=[LossOptions.Output(display_name="loss_options")],
        )

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        timesteps, loss = Timesteps(**inputs.values(Timesteps, given)), Loss(**inputs.values(Loss, given))
        return io.NodeOutput((timesteps, loss))


class ZTurboSavingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboSavingOptions",
            display_name="Saving Options",
            category=CATEGORY,
            description=(
                "How often Train LoRA writes a checkpoint and the LoRA so far, how many checkpoints stay, and the "
                "number format of the LoRA. Without this node: every 250 steps, two stay, bf16."
            ),
            search_aliases=["checkpoint", "save every", "keep"],
            inputs=inputs.of(Saving, "every", "keep", "dtype"),
            outputs=[SavingOptions.Output(display_name="saving_options")],
        )

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(Saving(**inputs.values(Saving, given)))


class ZTurboHealthOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboHealthOptions",
            display_name="Turbo Health Options",
            category=CATEGORY,
            description=(
                "How Train LoRA watches turbo's wear and keeps turbo. The gauge compares turbo with the LoRA and "
                "clean turbo on prompts that have nothing to do with your pictures: 0 untouched, 1 broken. Without "
                "this node: a reading every 250 steps, and nothing ends the run."
            ),
            search_aliases=["turbo gauge", "turbo guard", "early stopping", "damage", "blurry lora"],
            inputs=inputs.of(
                Turbo,
                "every",
                "stop_above",
                "weight",
                "interval",
                "size",
                "prompts",
                "restore_steps",
                "restore_prompts",
            ),
            outputs=[HealthOptions.Output(display_name="health_options")],
        )

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        return io.NodeOutput(Turbo(**inputs.values(Turbo, given)))
