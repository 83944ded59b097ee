"""ComfyUI's code without its server: model, text encoder and VAE from files, and the host on them."""

from pathlib import Path

import torch


def open_host(recipe, cache: Path | None):
    """A `ComfyHost` for the recipe's inputs. cache: folder of encoded latents and texts, or None."""
    from comfy.cli_args import args

    # before anything else of comfy is imported
    args.cpu = args.cpu or not torch.cuda.is_available() and not torch.backends.mps.is_available()

    from .. import lorafile
    from . import comfy_adapter, comfy_load, comfy_tiny
    from .comfy import ComfyHost

    inputs = recipe.inputs
    if inputs.model == "tiny":
        model, clip, vae = comfy_load.load(comfy_tiny.MODEL)
    else:
        model, clip, vae = comfy_load.load(Path(inputs.model), Path(inputs.text_encoder), Path(inputs.vae))
    file = comfy_tiny.ADAPTER if inputs.adapter == "tiny" else Path(inputs.adapter)
    if inputs.adapter and inputs.adapter_strength:
        model = comfy_adapter.apply(model, lorafile.read(file), file.name, inputs.adapter_strength)
    return ComfyHost(model, clip, vae, recipe, cache=cache)
