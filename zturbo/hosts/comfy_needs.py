"""What a run in ComfyUI needs of memory: the sums of `memory`, with the sizes of the model that is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import comfy.model_management

from .. import attention, compiled, keeping, lowrank, memory, network, turbo
from ..dataset import Dataset
from ..keeping import Sizes
from ..lowrank import Difference
from ..memory import Need
from . import comfy_adapter, comfy_blocks, devices, room

if TYPE_CHECKING:
    from .comfy import ComfyHost


def foresee(host: ComfyHost, dataset: Dataset):
    """See `runs.Host.foresee`."""
    sizes, reduction = dataset.buckets(), host.family.reduction
    pixels, least = max(width * height for width, height in sizes), min(min(size) for size in sizes)
    picture = memory.tokens(pixels, max(dataset.captions().texts, key=len))
    watched = turbo.side(host.recipe, host, least // reduction) * reduction
    guarded = memory.tokens(watched**2, max(host.recipe.turbo.prompts, key=len, default=""))
    tokens = memory.together(host.recipe, picture, guarded, 1)
    numbers = network.count(host.targets, host.recipe.network)
    fast = host.recipe.network.kind == "lora" and not comfy_blocks.usable(host.dit, {}, host.device)
    step = of_step(host, numbers, tokens, activations(host, None, tokens, by_hand(host), fast))
    room.check(host.device, step, of_previews(host, numbers), host.model.model_size())


def by_hand(host: ComfyHost) -> int | None:
    """Layers that are kept by hand, as far as sums count them: on a card memory that runs out is answered."""
    return host.whole if devices.shares_main_memory(host.device) else 0


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
    heads, size = layer.attention.n_local_heads, host.dtype.itemsize
    graph = attention.by_graph(host.device, host.dtype)
    fused = not compiled.why_not(host.device, host.recipe.compute.compile, host.recipe.compute.repeat)
    return Sizes(len(dit.layers), dit.dim, inner, heads, ranks, size, graph, fused)


def activations(
    host: ComfyHost, lora: Mapping[str, Difference] | None, tokens: int, whole: int | None, fast: bool
) -> float:
    """Bytes that a step keeps where so many layers keep everything; None: the least. fast: by `comfy_blocks`."""
    if fast:
        return keeping.plan(sizes_of(host, lora), tokens, 0, whole).bytes
    depth = len(host.dit.layers)
    return memory.activations(tokens, host.dit.dim, depth, host.dtype.itemsize, whole != depth).size


def at_least(
    host: ComfyHost, lora: Mapping[str, Difference], at_once: int | None, whole: int | None, fast: bool
) -> int:
    """Bytes that a step takes at least beside the weights. at_once: pictures together; whole: see `activations`."""
    tokens = host.tokens(at_once)
    kept = activations(host, lora, tokens, whole, fast)
    return int(memory.total(of_step(host, lowrank.count(lora), tokens, kept)))


def fitting(host: ComfyHost, lora: Mapping[str, Difference], fast: bool) -> int:
    """Pictures that go through together: all (0), or as many as there is room for, at least one.

    A card counts as a whole, as ComfyUI clears it for the run. Where not even one picture has room there beside all
    weights, these come and go, and serve as many pictures as fit each time.
    """
    main, at_once = devices.shares_main_memory(host.device), 0
    whole, card = by_hand(host), 0.0 if main else devices.total_memory(host.device) - room.ASIDE
    for there in [free(host)] if main else [card - host.model.model_size(), card]:
        at_once = 0
        while (needed := at_least(host, lora, at_once, whole, fast)) > there:
            if memory.one_by_one(host.recipe, at_once):
                break
            at_once = memory.fewer(host.recipe, at_once)
        if needed <= there:
            break
    return at_once


def free(host: ComfyHost) -> float:
    """Bytes that are free where the model computes, once all of its weights are there.

    Of main memory three quarters: a system that runs out of it ends programs.
    """
    model, found = host.model, comfy.model_management.get_free_memory(host.device)
    if devices.shares_main_memory(host.device):
        return 0.75 * found
    return found - max(0, model.model_size() - model.loaded_size())


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
