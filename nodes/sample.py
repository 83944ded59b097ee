"""Draw with the turbo model."""

import logging

from comfy_api.latest import io

from ..zturbo.hosts import comfy_adapter, comfy_control, comfy_draw
from . import inputs
from .screen import say
from .types import CATEGORY

log = logging.getLogger("zturbo")


class ZTurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboSampler",
            display_name="Z-Image Turbo Sampler",
            category=CATEGORY,
            description=(
                "Prompt to picture at turbo speed: 8 steps, CFG 1, scheduler simple, with core's own sampler. Says so "
                "when the model still carries the de-distill adapter."
            ),
            search_aliases=["turbo sampler", "8 steps", "text to image"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The turbo model, with or without LoRAs, without the de-distill adapter."
                ),
                *inputs.text_and_picture(),
                io.String.Input(
                    "prompt", multiline=True, default="", tooltip="What to draw. Turbo takes no negative prompt."
                ),
                *inputs.sides("Pixels, a multiple of 16. Usual: 1024; the tiny model: 128."),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Sampler steps. The model is distilled to 8; more takes longer and is seldom better.",
                ),
                inputs.noise("Picks the noise: same seed, same picture.", anew=True),
                inputs.sampler(
                    "euler is what previews use by default; res_multistep is the official template's, with finer "
                    "detail on the real model."
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Pictures at once. Memory grows with it.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, model, clip, vae, prompt, steps, batch_size, **given) -> io.NodeOutput:
        tag = comfy_adapter.carried(model)
        text = f"{steps} steps, no de-distill adapter on the model."
        if tag is not None and tag.net != 0:
            text = (
                f"The model carries the de-distill adapter {tag.file} at {tag.net:+g}: {steps} steps will look "
                "blurred. Use the clean model, or take it away with -1."
            )
            log.warning("%s", text)
        say(cls, text)
        latents = comfy_draw.sample(
            model,
            comfy_draw.encode_prompt(clip, prompt),
            comfy_draw.Drawing(steps=steps, **given),
            batch_size,
            comfy_control.sampling_progress(model, steps),
        )
        return io.NodeOutput(comfy_draw.decode(vae, latents), ui={"text": (text,)})
