"""Train a LoRA inside the graph."""

from dataclasses import replace

from comfy_api.latest import io

from ..zturbo.filenames import bad_name
from ..zturbo.hosts import comfy_run
from ..zturbo.recipe import (
    AdapterCourse,
    Compute,
    Loss,
    Network,
    Optimizer,
    Previews,
    Recipe,
    Saving,
    Timesteps,
    Turbo,
)
from . import inputs
from .types import (
    CATEGORY,
    AdapterSchedule,
    HealthOptions,
    LoraModel,
    LossMap,
    LossOptions,
    NetworkOptions,
    OptimizerOptions,
    SavingOptions,
    TrainingSet,
)


def recipe_of(given: dict) -> Recipe:
    """What the trainer's own inputs say, on what comes from the option nodes that are connected. Raises ZTurboError."""

    def part(options):
        return replace(options, **inputs.values(type(options), given))

    timesteps, loss = given.get("loss_options") or (Timesteps(), Loss())
    return Recipe(
        **inputs.values(Recipe, given) | {"name": given["name"].strip()},
        network=part(given.get("network_options") or Network()),
        optimizer=part(given.get("optimizer_options") or Optimizer()),
        timesteps=part(timesteps),
        loss=part(loss),
        saving=part(given.get("saving_options") or Saving()),
        compute=part(Compute()),
        adapter=part(given.get("adapter_schedule") or AdapterCourse()),
        turbo=part(given.get("health_options") or Turbo()),
        previews=part(Previews()),
    )


class ZTurboTrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboTrainLoRA",
            display_name="Train LoRA (Turbo)",
            category=CATEGORY,
            description=(
                "Trains a LoRA in this ComfyUI on the model that comes in. With the de-distill adapter on that model "
                "(+1), the LoRA works at turbo speed on the clean one. Previews are drawn on the clean turbo model "
                "with the LoRA so far: what you will get. Stop and keep hands the LoRA so far to the next node; "
                "Cancel saves it and ends the run."
            ),
            search_aliases=["lora training", "finetune", "train"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "Z-Image-Turbo with the De-Distill Adapter at +1; or an undistilled Z-Image, with the turbo "
                        "model as preview_model."
                    ),
                ),
                *inputs.text_and_picture(),
                TrainingSet.Input("dataset", tooltip="From Image Dataset."),
                *inputs.of(Recipe, "name", "steps"),
                *inputs.of(Previews, "prompts"),
                *inputs.of(Optimizer, "learning_rate", advanced=True),
                *inputs.of(Network, "rank", "alpha", advanced=True),
                *inputs.of(Recipe, "batch_size", "seed", advanced=True),
                *inputs.of(Timesteps, "density", advanced=True),
                *inputs.of(Turbo, "keep", advanced=True),
                *inputs.of(Previews, "every", "width", "height", "seed", advanced=True),
                *inputs.of(Compute, "dtype", "checkpointing", "keep_layers", "adapter", advanced=True),
                *inputs.of(Compute, "repeat", "compile", advanced=True),
                io.String.Input(
                    "resume",
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "auto: a run of the same settings and pictures that was cancelled or cut off goes on where it "
                        "was, to the same bits. new: always from the beginning. Or a run's name from output/zturbo "
                        "(my_lora_2, or my_lora_2/step_000500 for one checkpoint): a new run goes on from there, for "
                        "instance with more steps."
                    ),
                ),
                io.Model.Input(
                    "preview_model",
                    optional=True,
                    tooltip="What previews are drawn with. Not connected: the same model without the adapter.",
                ),
                NetworkOptions.Input(
                    "network_options",
                    optional=True,
                    tooltip="From Network Options. Not connected: LoRA on every Linear of the 30 layers.",
                ),
                OptimizerOptions.Input(
                    "optimizer_options",
                    optional=True,
                    tooltip="From Optimizer Options. Not connected: AdamW at a constant learning rate.",
                ),
                LossOptions.Input(
                    "loss_options",
                    optional=True,
                    tooltip="From Timestep and Loss Options. Not connected: all noise levels, mean square error.",
                ),
                SavingOptions.Input(
                    "saving_options",
                    optional=True,
                    tooltip="From Saving Options. Not connected: a checkpoint every 250 steps, two stay.",
                ),
                AdapterSchedule.Input(
                    "adapter_schedule",
                    optional=True,
                    tooltip="From Adapter Schedule. Not connected: the adapter stays as strong as it is.",
                ),
                HealthOptions.Input(
                    "health_options",
                    optional=True,
                    tooltip=(
                        "From Turbo Health Options. Not connected: the gauge is read every 250 steps, and nothing "
                        "ends the run."
                    ),
                ),
            ],
            outputs=[
                LoraModel.Output(display_name="lora"),
                LossMap.Output(display_name="loss_map"),
                io.Image.Output(display_name="previews"),
                io.String.Output(display_name="path"),
                io.Int.Output(display_name="steps"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, dataset, resume, preview_model=None, **given) -> io.NodeOutput:
        models, hidden = comfy_run.Models(model, clip, vae, preview_model), cls.hidden
        workflow = (hidden.extra_pnginfo or {}).get("workflow")
        trained = comfy_run.train(recipe_of(given), dataset, models, hidden.unique_id, resume.strip(), workflow)
        return io.NodeOutput(trained.lora, {"loss": trained.losses}, trained.images, str(trained.path), trained.steps)

    @classmethod
    def validate_inputs(cls, name):
        return name is None or bad_name(name.strip()) or True  # None: it comes from another node
