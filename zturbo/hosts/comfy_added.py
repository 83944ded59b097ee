"""What other nodes have put on a MODEL or CLIP beside patched weights.

Training calls the diffusion model's own parts, with the weights that core patches and loads. What acts around them
while pictures are drawn is not there: that which changes what the model draws is refused, that which only steers the
sampler is told, and that which only makes drawing faster is nobody's concern.
"""

import uuid
from collections.abc import Iterator

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..errors import ModelError

FASTER = {"torch.compile", "easycache", "lazycache"}  # keys of wrappers
AROUND_THE_MODEL = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
BETWEEN_BLOCKS = ("double_block", "noise_refiner")  # those patches that Z-Image's forward asks for
STEERING = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "denoise_mask_function",
)
MODEL = "diffusion_model"


def refuse(model, who: str):
    """Raise ModelError where the MODEL draws with more than its weights. who: sees nothing of that, as `training`."""
    found = unseen(model)
    if found:
        raise ModelError(
            f"The model carries {', '.join(found)}, put on by another node, which acts only while a picture is drawn: {who} would not see it. "
            "Connect the MODEL from in front of that node; a LoRA that is wanted here goes on with Load LoRA, without bypass."
        )


def unseen(model) -> list[str]:
    """In words, what changes what a MODEL draws and is neither weight nor patch."""
    options = model.model_options.get("transformer_options", {})
    found = ["a LoRA in bypass mode" if key == "bypass_lora" else f"the injection {key}" for key in model.injections]
    # torch.compile's is the same part
    found += [
        f"another {name}"
        for name, part in model.object_patches.items()
        if name.split(".")[0] == MODEL and not hasattr(part, "_orig_mod")
    ]
    found += [f"a patch between its blocks ({name})" for name in BETWEEN_BLOCKS if options.get("patches", {}).get(name)]
    found += ["scaled positions (rope_options)"] if options.get("rope_options") else []
    found += (
        ["a wrapper around the model (model_function_wrapper)"]
        if model.model_options.get("model_function_wrapper")
        else []
    )
    found += [
        f"a wrapper around the model ({key})"
        for kind in AROUND_THE_MODEL
        for key in _keys(model, "wrappers", kind)
        if key not in FASTER
    ]
    return found + (["hooks"] if model.hook_patches or model.forced_hooks else [])


def steering(model) -> str:
    """A sentence on what is on a MODEL that acts on the sampler, and so on previews but not on training; or nothing."""
    options = model.model_options.get("transformer_options", {})
    found = [name for name in STEERING if model.model_options.get(name)]
    found += ["an attention of its own"] if options.get("optimized_attention_override") else []
    around = [kind for kind in vars(WrappersMP).values() if isinstance(kind, str) and kind not in AROUND_THE_MODEL]
    found += [
        f"a wrapper of the sampler ({key})"
        for kind in around
        for key in _keys(model, "wrappers", kind)
        if key not in FASTER
    ]
    found += [
        f"a callback ({key})"
        for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE)
        for key in _keys(model, "callbacks", kind)
    ]
    words = ", ".join(dict.fromkeys(found))
    return (
        f"The model carries {words}, put on by other nodes: they act while a picture is drawn, as in previews, and not on what is trained."
        if words
        else ""
    )


def _keys(model, store: str, kind: str) -> list[str]:
    """Of the wrappers or callbacks of a kind that are there, on the MODEL or in its options."""
    both = (getattr(model, store), model.model_options.get("transformer_options", {}).get(store, {}))
    return list(dict.fromkeys(str(key) for one in both for key, there in one.get(kind, {}).items() if there))


def refuse_hooks(clip):
    """Raise ModelError where a CLIP hands hooks on with its CONDITIONING: they would be on the model in previews, and not in training."""
    if clip is not None and clip.apply_hooks_to_conds:
        raise ModelError(
            "The text encoder carries hooks (Set CLIP Hooks) that change the model while a picture is drawn: training would not see them. Connect the CLIP from in front of that node."
        )


def injected(patcher) -> Iterator[tuple]:
    """What tells a patcher's injections apart: (name, strength, *tensors) of each LoRA in bypass mode, and for an unknown one something that is never the same."""
    for key, injections in sorted(patcher.injections.items()):
        for injection in injections:
            cells = [cell.cell_contents for cell in getattr(injection.inject, "__closure__", None) or ()]
            loras = [cell.adapters for cell in cells if isinstance(getattr(cell, "adapters", None), dict)]
            yield from (
                (name, strength, *adapter.weights)
                for found in loras
                for name, (adapter, strength) in sorted(found.items())
            )
            if not loras:
                yield key, uuid.uuid4().hex
