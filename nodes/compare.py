"""LoRAs, checkpoints and strengths side by side."""

from comfy_api.latest import io

from ..zturbo import comparison
from ..zturbo.errors import ZTurboError
from ..zturbo.hosts import comfy_compare, comfy_draw
from . import inputs
from .screen import face, lines
from .types import CATEGORY, UNWIRED, LoraModel


class ZTurboCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboCompare",
            display_name="Compare LoRAs",
            category=CATEGORY,
            description=(
                "Draws the same prompts with several LoRAs, checkpoints of a run and strengths, all from the same "
                "noise at 8 steps, into one labelled grid. The model is loaded once."
            ),
            search_aliases=["xy plot", "grid", "compare checkpoints", "lora strength", "best epoch"],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "Turbo, from any loader. An adapter of this pack on it is taken away first; LoRAs on it stay "
                        "on it, in every column."
                    ),
                ),
                *inputs.text_and_picture(),
                io.String.Input(
                    "loras",
                    multiline=True,
                    default="",
                    tooltip=(
                        "One a line: a file of models/loras, or a run of output/zturbo: my_lora for its LoRA, "
                        "my_lora/step_000500 for a checkpoint, my_lora/healthy, or my_lora/all for all its checkpoints."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip=(
                        "One a line, each a row: some with the trigger word ([trigger] stands for it), some without."
                    ),
                ),
                io.String.Input(
                    "strengths",
                    default="1",
                    tooltip="Of the LoRAs, with commas between: 0.6, 0.8, 1. Each is a column. -10 to 10; usual: 1.",
                ),
                io.Boolean.Input(
                    "without",
                    default=True,
                    tooltip="On: the first column is the model without any of these LoRAs.",
                ),
                *inputs.sides("Pixels of each picture, a multiple of 16. Usual: 512 to 1024; the tiny model: 128."),
                inputs.noise("Picks the noise, the same for all pictures."),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="Sampler steps. The model is distilled to 8.",
                ),
                inputs.sampler("euler is what previews are drawn with; res_multistep is the official template's."),
                LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="From Train LoRA, or from core's Load LoRA Model: the first LoRA of the grid.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid"),
                io.Image.Output(display_name="pictures"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, loras, prompts, lora=None, **given) -> io.NodeOutput:
        found = comfy_compare.given(lines(loras), lora)
        rows = comfy_compare.filled(lines(prompts), found)
        strengths = comparison.read_strengths(given.pop("strengths"))
        size = given["width"], given["height"]
        columns = comparison.columns(list(found), strengths, given.pop("without"), len(rows), size)
        how = comfy_draw.Drawing(**given)
        made = comfy_compare.compare((model, clip, vae), found, columns, rows, how, cls.hidden.unique_id)
        return io.NodeOutput(made.grid, made.pictures, made.text, ui=face(cls, made.text, made.grid))

    @classmethod
    def validate_inputs(cls, loras, prompts, strengths, width, height, lora=UNWIRED):
        """Whether a run or a file is there is asked when it is drawn: the graph itself may make it. None: of another
        node."""
        if None in (loras, prompts, strengths, width, height):
            return True
        try:
            asked = [*lines(loras), *([] if lora == UNWIRED else ["lora"])]
            size = width, height
            comparison.columns(asked, comparison.read_strengths(strengths), True, len(lines(prompts)), size)
        except ZTurboError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, loras, **_):
        return "" if loras is None else comfy_compare.fingerprint(lines(loras))
