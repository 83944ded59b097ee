"""LORA_MODEL to a file."""

from comfy_api.latest import io

from ..zturbo import lorafile
from ..zturbo.hosts import comfy_paths
from .screen import say
from .types import CATEGORY, LoraModel


def save(node, state: dict, metadata: dict[str, str], name: str, overwrite: bool, report: str = "") -> tuple[str, str]:
    """Write a LoRA into models/loras and say so on the node, behind a report: (path, what was said)."""
    path = lorafile.write(comfy_paths.lora_path(name, overwrite), state, metadata)
    text = "\n".join(
        filter(None, (report, f"Saved {path.name} in models/loras. Press R to see it in the lists of loaders."))
    )
    say(node, text)
    return str(path), text


def file_inputs(name: str, dtype_tip: str) -> list[io.Input]:
    """Of a node that writes a LoRA file. name: what it is called until somebody says otherwise."""
    where = (
        "File name in models/loras, without .safetensors; a / makes a sub-folder. When it exists, _2, _3 … is added."
    )
    again = "Replace a file of the same name instead of counting up."
    return [
        io.String.Input("name", default=name, tooltip=where),
        io.Combo.Input("dtype", options=list(lorafile.DTYPES), default="bf16", tooltip=dtype_tip),
        io.Boolean.Input("overwrite", default=False, tooltip=again),
    ]


class ZTurboSaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboSaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description=(
                "Writes a LoRA into models/loras under the names that ComfyUI, diffusers and other trainers read, "
                "with its metadata. A file is replaced only when you say so."
            ),
            search_aliases=["export lora", "write lora"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                LoraModel.Input(
                    "lora", tooltip="From Train LoRA, or from any node that gives a LORA_MODEL for Z-Image."
                ),
                *file_inputs(
                    "my_lora", "Of the numbers in the file. bf16: half the size of fp32, and what the trainer hands on."
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name):
        return name is None or comfy_paths.bad_lora_name(name) or True  # None: it comes from another node

    @classmethod
    def execute(cls, lora, name, dtype, overwrite) -> io.NodeOutput:
        given = lorafile.of_state(lora, "The LORA_MODEL", keep_fused=True)
        state, kept, _ = lorafile.whole_state(given, lorafile.DTYPES[dtype], "The LORA_MODEL")
        report = f"Only ComfyUI reads all of it: kept under its names are {kept}." if kept else ""
        path, text = save(cls, state, given.metadata, name, overwrite, report)
        return io.NodeOutput(path, ui={"text": (text,)})
