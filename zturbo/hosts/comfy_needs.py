"""What a run in ComfyUI needs of memory: the sums of `memory`, with the sizes of the model that is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import comfy.model_management

from .. import keeping, memory, network, turbo
from ..dataset import Dataset
from ..keeping import Sizes
from ..lowrank import Difference
from ..memory import Need
from . import comfy_adapter, devices, room

if TYPE_CHECKING:
    from .comfy import ComfyHost


def foresee(host: ComfyHost, dataset: Dataset):
    """See `runs.Host.foresee`."""
    sizes, reduction = dataset.buckets(), host.family.reduction
    pixels, least = max(width * height for width, height in sizes), min(min(size) for size in sizes)
    picture = memory.tokens(pixels, max(dataset.captions().texts, key=len))
    watched = turbo.side(host.recipe, host, least // reduction) * reduction
    guarded = memory.tokens(watched**2, max(host.recipe.turbo.prompts, key=len, default=""))
    # on a card memory that runs out is an error, which is answered
    one_by_one = not devices.shares_main_memory(host.device)
    tokens = memory.together(host.recipe, picture, guarded, one_by_one)
    numbers = network.count(host.targets, host.recipe.network)
    whole = host.whole if host.whole and not one_by_one else 0
    activations = keeping.plan(sizes_of(host, None), tokens, 0, whole).bytes
    step = of_step(host, numbers, tokens, activations)
    room.check(host.device, step, of_previews(host, numbers), host.model.model_size())


def sizes_of(host: ComfyHost, lora: Mapping[str, Difference] | None) -> Sizes:
    """lora: None: one that is not there yet, of the recipe's rank on every Linear."""
    dit = host.dit
    layer, inner = dit.layers[0], dit.layers[0].feed_forward.w1.out_features
    beside = {} if host.tag is None or host.way == "merged" else host.tag.factors
    ranks = sum(one.rank for name, one in beside.items() if name.startswith("layers.0."))
    if lora is None:
        ranks += 7 * host.recipe.network.rank
    else:
        ranks += sum(one.rank for one in lora.values()) // len(dit.layers)
    return Sizes(len(dit.layers), dit.dim, inner, layer.attention.n_local_heads, ranks, host.dtype.itemsize)


def free(host: ComfyHost) -> float:
    """Bytes that are free where the model computes, once all of its weights are there."""
    model = host.model
    coming = 0 if devices.shares_main_memory(host.device) else max(0, model.model_size() - model.loaded_size())
    return comfy.model_management.get_free_memory(host.device) - coming


def of_step(host: ComfyHost, numbers: int, tokens: int, activations: float) -> list[Need]:
    """Beside the weights.

    numbers: how many are trained; tokens: that go through the model at once; activations: bytes that it keeps.
    """
    recipe, width, depth, size = host.recipe, host.dit.dim, len(host.dit.layers), host.dtype.itemsize
    merged, main = host.way == "merged", devices.shares_main_memory(host.device)
    moment = Need("a step's activations", activations)
    if main:  # a checkpoint is written while the next step goes forward, and is gone before that one's backward
        copy, forward = memory.copy(recipe, numbers), tokens * width * size * depth
        moment = max(moment, Need(copy.what, copy.size + forward), key=lambda need: need.size)
    adapter = 0 if host.tag is None or merged else sum(f.A.numel() + f.B.numel() for f in host.tag.factors.values())
    needs = [
        memory.lora(recipe, numbers),
        moment,
        Need("the adapter beside the weights", adapter * size),
        Need("a weight as it is computed with", largest_cast(host) * size),
    ]
    if main:
        needs.append(Need("a run's code and threads", memory.OWN))
    if main and host.tag is not None and merged:
        needs.append(Need("the clean weights, while the adapter is in the others", layers(host)))
    return needs


def largest_cast(host: ComfyHost) -> int:
    """Numbers of the largest weight that is not stored as it is computed with."""
    linears = comfy_adapter.linears(host.dit).values()
    cast = (one for one in linears if one.weight is None or one.weight.dtype != host.dtype)
    return max((one.in_features * one.out_features for one in cast), default=0)


def layers(host: ComfyHost) -> int:
    """Bytes of the trained layers, which are there twice while something is patched into them."""
    return sum(module.weight.nbytes for module in comfy_adapter.linears(host.dit, host.family.trained).values())


def of_previews(host: ComfyHost, numbers: int) -> list[Need]:
    """In main memory, while a preview is drawn, by core's own sums.

    A card that is too small for one draws it in tiles, or none.
    """
    previews = host.recipe.previews
    if not previews.prompts or not devices.shares_main_memory(host.device):
        return []
    shape = host.family.latent(1, previews.width, previews.height)
    drawing = max(host.preview_model.memory_required(shape), host.vae.memory_used_decode(shape, host.vae.vae_dtype))
    return [
        memory.lora(host.recipe, numbers),
        Need("the weights with the LoRA in them", layers(host)),
        Need("a preview while it is drawn", drawing),
    ]
