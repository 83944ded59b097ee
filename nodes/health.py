"""How turbo a LoRA leaves the model."""

import folder_paths
from comfy_api.latest import io

from ..zturbo.health import PROMPTS, WATCHED
from ..zturbo.hosts import comfy_health, comfy_paths
from . import inputs
from .screen import lines, say
from .types import CATEGORY, CONNECTED, UNWIRED, LoraModel, fingerprint_of, need_one, one_way


class ZTurboHealth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboHealth",
            display_name="Turbo Health",
            category=CATEGORY,
            description=(
                "How much of turbo a LoRA wears off: the gauge (0 untouched, 1 broken), a plot over the noise levels, "
                "and 8-step pictures of unrelated prompts side by side, without and with the LoRA."
            ),
            search_aliases=["lora damage", "turbo gauge", "compare lora", "blurry lora"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "Turbo, from any loader. An adapter of this pack on it is taken away first; LoRAs on it stay "
                        "on it, for both sides."
                    ),
                ),
                *inputs.text_and_picture(),
                io.Combo.Input(
                    "file",
                    options=[CONNECTED, *folder_paths.get_filename_list("loras")],
                    default=CONNECTED,
                    tooltip="A LoRA from models/loras, or the one connected to lora.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="\n".join(PROMPTS[:WATCHED]),
                    tooltip=(
                        "Prompts that have nothing to do with the LoRA, one a line, without its trigger word. Each is "
                        "drawn twice. Usual: 8; with the trainer's own first 8 the reading is the trainer's."
                    ),
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Pixels, width and height. Usual: 512; the tiny model: 128.",
                ),
                inputs.noise("Picks the noise, the same on both sides."),
                LoraModel.Input("lora", optional=True, tooltip="From Train LoRA, or from core's Load LoRA Model."),
            ],
            outputs=[
                io.Float.Output(display_name="gauge"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="plot"),
                io.Image.Output(display_name="pictures"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, file, prompts, lora=None, **given) -> io.NodeOutput:
        need_one(file, lora, "a LoRA")
        found = comfy_health.report(
            model, clip, vae, comfy_paths.lora_file(file) if lora is None else lora, lines(prompts), **given
        )
        say(cls, found.text)
        return io.NodeOutput(found.gauge, found.text, found.plot, found.pictures, ui={"text": (found.text,)})

    @classmethod
    def validate_inputs(cls, file, lora=UNWIRED):
        return one_way(file, lora, "a LoRA")

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return fingerprint_of(file, CONNECTED)
