"""A LoRA file of another trainer to one that everything reads."""

import folder_paths
from comfy_api.latest import io

from ..zturbo import convert, lorafile
from ..zturbo.hosts import comfy_paths, comfy_weights
from .save import save
from .types import CATEGORY, LoraModel, fingerprint_of


class ZTurboConvertLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboConvertLoRA",
            display_name="Convert LoRA",
            category=CATEGORY,
            description=(
                "Reads a Z-Image LoRA of any trainer (kohya, musubi-tuner, diffusers, PEFT, LyCORIS, OneTrainer …) and "
                "writes it into models/loras under the names that ComfyUI and diffusers read, at a smaller rank if you "
                "wish. Says how much was lost."
            ),
            search_aliases=["resize lora", "lora key not loaded", "lokr", "loha", "dora", "kohya", "musubi", "peft"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip=(
                        "A LoRA for Z-Image from models/loras, as its trainer wrote it. PEFT's "
                        "adapter_model.safetensors needs its adapter_config.json beside it, which holds the strength."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="my_lora_converted",
                    tooltip=(
                        "File name in models/loras, without .safetensors; a / makes a sub-folder. When it exists, _2, "
                        "_3 … is added."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip=(
                        "0: keep rank and kind. Else every part becomes a plain LoRA of at most this rank, as near as "
                        "that rank allows; parts of a lower rank stay. Usual: 0, or 8 to 32 for a smaller file. LoKr "
                        "and LoHa need 32 to 128; DoRA cannot be resized."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(lorafile.DTYPES),
                    default="bf16",
                    tooltip=(
                        "Of the numbers in the file. bf16: half the size of fp32. fp32: to the bit what the source "
                        "has; fp16: finer than bf16 for small numbers."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a file of the same name instead of counting up."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "Only for a DoRA with a length for each output row (PEFT's, most of LyCORIS'): the Z-Image "
                        "that it was trained on. With it the file draws in ComfyUI as in its training; the report says "
                        "when it is needed."
                    ),
                ),
            ],
            outputs=[
                LoraModel.Output(display_name="lora"),
                io.String.Output(display_name="path"),
                io.String.Output(display_name="report"),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name):
        return name is None or comfy_paths.bad_lora_name(name) or True  # None: it comes from another node

    @classmethod
    def execute(cls, file, name, rank, dtype, overwrite, model=None) -> io.NodeOutput:
        made = convert.convert(comfy_paths.lora_file(file), rank, dtype, comfy_weights.of(model))
        path, text = save(cls, made.state, made.state.metadata, name, overwrite, made.report)
        return io.NodeOutput(made.state, path, text, ui={"text": (text,)})

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return fingerprint_of(file)
