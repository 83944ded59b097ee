"""Load the turbo model; put the de-distill adapter on and take it away."""

import folder_paths
from comfy_api.latest import io

from ..zturbo import lorafile
from ..zturbo.hosts import comfy_adapter, comfy_load, comfy_paths, comfy_tiny
from ..zturbo.hosts.comfy_paths import TINY
from .types import CATEGORY

AUTO = "auto"
QWEN, AE = ("qwen_3_4b.safetensors", "qwen_3_4b_fp8_mixed.safetensors"), ("ae.safetensors",)  # what auto looks for
DE_DISTILL, RESTORE = "+1 de-distill", "-1 restore"


def full_path(folder: str, name: str) -> str:
    return folder_paths.get_full_path_or_raise(folder, name)


def read_adapter(name: str) -> lorafile.LoraFile:
    return lorafile.read(comfy_tiny.ADAPTER if name == TINY else full_path("loras", name))


class ZTurboLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboLoadModel",
            display_name="Load Z-Image Turbo",
            category=CATEGORY,
            description=(
                "Loads Z-Image-Turbo with its text encoder and VAE, from three files or from a checkpoint that holds "
                "them all, in any precision that ComfyUI reads. Any other loader's MODEL, CLIP and VAE work with this "
                "pack as well."
            ),
            search_aliases=["z-image", "zimage", "load turbo", "checkpoint"],
            inputs=[
                io.Combo.Input(
                    "diffusion_model",
                    options=[TINY, *comfy_paths.model_names()],
                    tooltip=(
                        "From models/diffusion_models: z_image_turbo_bf16.safetensors (12 GB), or an fp8, int8, mxfp8 "
                        "or nvfp4 file (4 to 6 GB). checkpoints/…: from models/checkpoints. The bundled tiny model (7 "
                        "MB) draws shapes of 64 to 144 pixels a side and is there to try everything out."
                    ),
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[AUTO, *folder_paths.get_filename_list("text_encoders")],
                    default=AUTO,
                    tooltip=(
                        "From models/text_encoders. auto: the one in the checkpoint, if it holds one; else "
                        "qwen_3_4b.safetensors or qwen_3_4b_fp8_mixed.safetensors; the bundled one for the tiny model."
                    ),
                ),
                io.Combo.Input(
                    "vae",
                    options=[AUTO, *folder_paths.get_filename_list("vae")],
                    default=AUTO,
                    tooltip=(
                        "From models/vae. auto: the one in the checkpoint, if it holds one; else ae.safetensors; the "
                        "bundled one for the tiny model."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls, diffusion_model, text_encoder, vae) -> io.NodeOutput:
        model = comfy_tiny.MODEL if diffusion_model == TINY else comfy_paths.model_file(diffusion_model)
        has_clip, has_vae = comfy_load.own_parts(model)
        clip_file = cls.file("text_encoders", text_encoder, QWEN, has_clip)
        vae_file = cls.file("vae", vae, AE, has_vae)
        return io.NodeOutput(*comfy_load.load(model, clip_file, vae_file))

    @classmethod
    def file(cls, folder: str, name: str, usual: tuple[str, ...], models_own: bool):
        """None for the one that comes with the model."""
        if name != AUTO:
            return comfy_paths.part_file(folder, name)
        return None if models_own else comfy_paths.part_file(folder, *usual)


class ZTurboDeDistillAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZTurboDeDistillAdapter",
            display_name="De-Distill Adapter",
            category=CATEGORY,
            description=(
                "Puts the de-distill adapter on a turbo model (+1) so that a LoRA can be trained on it, or takes it "
                "away again (-1) to draw at turbo speed. Taking it away gives the very same weights as before."
            ),
            search_aliases=["training adapter", "dedistill", "turbo adapter"],
            inputs=[
                io.Model.Input("model", tooltip="A Z-Image-Turbo MODEL from any loader; LoRAs on it stay on it."),
                io.Combo.Input(
                    "adapter",
                    options=[TINY, *folder_paths.get_filename_list("loras")],
                    tooltip=(
                        "From models/loras: zimage_turbo_training_adapter_v2.safetensors (340 MB). tiny (bundled) "
                        "fits the tiny model only."
                    ),
                ),
                io.Combo.Input(
                    "direction",
                    options=[DE_DISTILL, RESTORE],
                    default=DE_DISTILL,
                    tooltip="+1 before training, -1 to take away what +1 put on.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the adapter, as a factor from 0 to 2. Usual: 1. Use the same for +1 and -1.",
                ),
                io.Boolean.Input(
                    "checkpoint_has_adapter",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Only for -1: the loaded checkpoint itself has the adapter merged in at 1.0 (a de-distilled "
                        "checkpoint), so take it out of the weights. Off for ordinary turbo files."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, adapter, direction, strength, checkpoint_has_adapter) -> io.NodeOutput:
        if strength == 0:
            return io.NodeOutput(model)
        sign, baked = (1, 0.0) if direction == DE_DISTILL else (-1, 1.0 if checkpoint_has_adapter else 0.0)
        return io.NodeOutput(comfy_adapter.apply(model, read_adapter(adapter), adapter, sign * strength, baked))

    @classmethod
    def fingerprint_inputs(cls, adapter, **_):
        if adapter is None:  # core's word for what another node will bring
            return ""
        return comfy_load.fingerprint(
            comfy_tiny.ADAPTER if adapter == TINY else folder_paths.get_full_path("loras", adapter)
        )
