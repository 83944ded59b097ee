"""Train a LoRA inside the graph."""

from dataclasses import replace

from comfy_api.latest import io

from ..zturbo.flow import DENSITIES
from ..zturbo.hosts import comfy_run
from ..zturbo.recipe import (
    KEEPS,
    REPEATS,
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
    bad_name,
)
from .screen import lines
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


class ZTurboTrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboTrainLoRA",
            display_name="Train LoRA (Turbo)",
            category=CATEGORY,
            description=(
                "Trains a LoRA in this ComfyUI on the model that comes in. With the de-distill adapter on that model (+1), the LoRA works at turbo speed on the clean one. "
                "Previews are drawn on the clean turbo model with the LoRA so far: what you will get. Stop and keep hands the LoRA so far to the next node; Cancel saves it and ends the run."
            ),
            search_aliases=["lora training", "finetune", "train"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Z-Image-Turbo with the De-Distill Adapter at +1; or an undistilled Z-Image, with the turbo model as preview_model.",
                ),
                io.Clip.Input("clip", tooltip="Z-Image's text encoder."),
                io.Vae.Input("vae", tooltip="Z-Image's VAE (Flux's ae.safetensors)."),
                TrainingSet.Input("dataset", tooltip="From Image Dataset."),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Names the run's folder in output/zturbo. When it exists, _2, _3 … is added.",
                ),
                io.Int.Input(
                    "steps",
                    default=2000,
                    min=1,
                    max=100000,
                    tooltip="Optimizer steps. Usual: 500 to 3000; past that turbo wears off.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Per step. Usual: 1e-4; lower is safer and slower. The tiny model wants about 1e-3, the optimizer prodigy 1.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=512,
                    tooltip="Width of the LoRA. Usual: 8 to 32. On the full model the file has 5.3 MB a rank in bf16.",
                ),
                io.Float.Input(
                    "alpha",
                    default=16.0,
                    min=0.1,
                    max=1024.0,
                    step=0.1,
                    tooltip="The LoRA is scaled by alpha / rank. Usual: the same as rank.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures a step. Memory and time grow with it. Usual: 1 to 4.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides noise, order and the LoRA's start: the same seed gives the same LoRA.",
                ),
                io.Combo.Input(
                    "timesteps",
                    options=list(DENSITIES),
                    default="weighted",
                    tooltip="Which noise levels are trained most. weighted: the reference trainer's choice for Turbo. content: composition, high noise. style: texture, low noise. sigmoid: the middle. shift: as drawn at 1024. linear: all alike. logit_normal: see Timestep and Loss Options.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=["bf16", "fp32"],
                    default="bf16",
                    tooltip="Of the computation; LoRA weights are always trained in fp32. fp32: about twice the memory and time.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=True,
                    tooltip="Much less memory for about a third more time. Off only where memory is plenty.",
                ),
                io.Combo.Input(
                    "adapter_way",
                    options=["auto", "branch", "merged"],
                    default="auto",
                    tooltip="How the adapter is carried while training. merged: patched into the weights, no extra work a step. branch: beside them, exact on fp8 and int8 models, no copy of the weights. auto picks and says which.",
                ),
                io.Combo.Input(
                    "keep_turbo",
                    options=list(KEEPS),
                    default="off",
                    tooltip="For long runs and high learning rates. guard: while it trains, the LoRA is held to leave pictures of unrelated prompts as they are; a guarded step computes four pictures more, of at most 512 pixels, and it learns less far. restore: the last steps (Turbo Health Options) train no pictures, but the LoRA to be itself where a prompt has the trigger word, and to leave turbo alone where none does.",
                ),
                io.String.Input(
                    "preview_prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line, drawn while training and at the end. Empty: no previews.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=250,
                    min=0,
                    max=100000,
                    tooltip="Steps between previews. 0: only at the end.",
                ),
                io.Int.Input(
                    "preview_width", default=1024, min=64, max=2048, step=16, tooltip="Pixels. The tiny model: 128."
                ),
                io.Int.Input(
                    "preview_height", default=1024, min=64, max=2048, step=16, tooltip="Pixels. The tiny model: 128."
                ),
                io.Int.Input(
                    "preview_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Picks the previews' noise, the same in every preview.",
                ),
                io.String.Input(
                    "resume",
                    default="auto",
                    tooltip="auto: a run of the same settings and pictures that was cancelled or cut off goes on where it was, to the same bits. new: always from the beginning. Or a run's name from output/zturbo (my_lora_2, or my_lora_2/step_000500 for one checkpoint): a new run goes on from there, for instance with more steps.",
                ),
                io.Combo.Input(
                    "repeat",
                    options=list(REPEATS),
                    default="exact",
                    tooltip="On a GPU. exact: the same run gives the same bits each time, and a resumed one those of one that was never stopped. fast: takes quicker kernels that do not; what is learnt is as good. A CPU is always exact.",
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
                    tooltip="From Turbo Health Options. Not connected: the gauge is read every 250 steps, and nothing ends the run.",
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
    def execute(
        cls, model, clip, vae, dataset, name, steps, learning_rate, rank, alpha, batch_size, seed, timesteps, compute_dtype, gradient_checkpointing,
        adapter_way, keep_turbo, preview_prompts, preview_every, preview_width, preview_height, preview_seed, resume, repeat,
        preview_model=None, network_options=None, optimizer_options=None, loss_options=None, saving_options=None, adapter_schedule=None, health_options=None,
    ) -> io.NodeOutput:  # fmt: skip
        timestep_options, loss = loss_options or (Timesteps(), Loss())
        recipe = Recipe(
            name=name.strip(),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            network=replace(network_options or Network(), rank=rank, alpha=alpha),
            optimizer=replace(optimizer_options or Optimizer(), learning_rate=learning_rate),
            timesteps=replace(timestep_options, density=timesteps),
            loss=loss,
            saving=saving_options or Saving(),
            compute=Compute(compute_dtype, gradient_checkpointing, adapter_way, repeat),
            adapter=adapter_schedule or AdapterCourse(),
            turbo=replace(health_options or Turbo(), keep=keep_turbo),
            previews=Previews(lines(preview_prompts), preview_every, preview_width, preview_height, seed=preview_seed),
        )
        trained = comfy_run.train(
            recipe, dataset, model, clip, vae, preview_model, cls.hidden.unique_id, resume.strip()
        )
        return io.NodeOutput(trained.lora, {"loss": trained.losses}, trained.images, str(trained.path), trained.steps)

    @classmethod
    def validate_inputs(cls, name):
        return name is None or bad_name(name.strip()) or True  # None: it comes from another node
