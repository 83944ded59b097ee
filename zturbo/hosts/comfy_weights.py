"""Clean weights of ComfyUI's MODEL, by the names of the LoRAs that live on them."""

from collections.abc import Callable
from functools import partial

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.utils
import torch

from .. import extract, lorafile
from ..convert import Weights
from ..errors import ModelError
from ..family import Z_IMAGE
from ..lowrank import Difference, Target
from . import comfy_adapter, comfy_added
from .comfy_mode import core_mode, lent


def of(model) -> Weights | None:
    """What `convert` asks of a MODEL, or nothing where there is none."""
    return None if model is None else partial(reader, model)


def reader(model, lora: dict[str, Difference], file: str) -> Callable[[str], torch.Tensor]:
    """Gives the weight [out, in] fp32 that a part of the LoRA changes, without any patch.

    Raises LoraFileError where the LoRA does not fit the MODEL.
    """
    targets = comfy_adapter.targets(comfy_adapter.diffusion_model(model))
    lorafile.check_fit(lora, targets, file)
    return weights(model, targets)


def weights(model, targets: list[Target], patched: bool = False) -> Callable[[str], torch.Tensor]:
    """Gives the weight [out, in] fp32 of a part by its name.

    patched: with what is patched onto the MODEL (LoRAs, merges).
    """
    places = {
        part.name: (f"{comfy_adapter.PREFIX}{target.module}.weight", part.rows)
        for target in targets
        for part in target.parts
    }

    def read(name: str) -> torch.Tensor:
        key, rows = places[name]
        with core_mode():
            weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
            # the clean one, where a patched one stands in the model
            weight = getattr(model.backup.get(key), "weight", weight)
            weight = weight if convert is None else convert(weight, inplace=False)
            weight = (weight.dequantize() if isinstance(weight, comfy.quant_ops.QuantizedTensor) else weight).float()
            if patched and key in model.patches:
                weight = comfy.lora.calculate_weight(model.patches[key], weight.clone(), key)
            return lent(weight[rows])

    return read


def extracted(undistilled, turbo, rank: int, node_id: str) -> extract.Extracted:
    """The adapter that makes the one MODEL of the other, on the Linears of the layers. Raises ZTurboError."""
    both = (undistilled, turbo)
    for model in both:
        comfy_added.refuse(model, "an extraction")
    targets, others = (comfy_adapter.targets(comfy_adapter.diffusion_model(model), Z_IMAGE.trained) for model in both)
    if targets != others:
        raise ModelError("The two models are not of the same size. Choose two of the same family.")
    bar = comfy.utils.ProgressBar(sum(len(target.parts) for target in targets), node_id=node_id)

    def check():
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    to, origin = (weights(model, targets, patched=True) for model in both)
    return extract.extract(to, origin, targets, rank, check)
