"""What other nodes have put on a MODEL or CLIP beside patched weights.

Training calls the diffusion model's own parts, with the weights that core patches and loads. What acts around them
while pictures are drawn is not there: that which changes what the model draws is refused, that which only steers the
sampler is told, and that which only makes drawing faster is nobody's concern.
"""

import uuid
from collections.abc import Iterable, Iterator

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
HOOKS = (
    "The text encoder carries hooks (Set CLIP Hooks) that change the model while a picture is drawn: training would not"
    " see them. Connect the CLIP from in front of that node."
)


def _not_seen(found: list[str], who: str) -> str:
    return (
        f"The model carries {', '.join(found)}, put on by another node, which acts only while a picture is drawn: "
        f"{who} would not see it. Connect the MODEL from in front of that node; "
        "a LoRA that is wanted here goes on with Load LoRA, without bypass."
    )


def _only_while_drawing(found: str) -> str:
    return (
        f"The model carries {found}, put on by other nodes: they act while a picture is drawn, as in previews, "
        "and not on what is trained."
    )


def refuse(model, who: str):
    """Raise ModelError where the MODEL draws with more than its weights. who: sees nothing of that, as `training`."""
    found = unseen(model)
    if found:
        raise ModelError(_not_seen(found, who))


def unseen(model) -> list[str]:
    """In words, what changes what a MODEL draws and is neither weight nor patch."""
    options = model.model_options.get("transformer_options", {})
    found = ["a LoRA in bypass mode" if key == "bypass_lora" else f"the injection {key}" for key in model.injections]
    parts = {name: part for name, part in model.object_patches.items() if name.split(".")[0] == MODEL}
    # torch.compile's is the same part
    found += [f"another {name}" for name, part in parts.items() if not hasattr(part, "_orig_mod")]
    found += [f"a patch between its blocks ({name})" for name in BETWEEN_BLOCKS if options.get("patches", {}).get(name)]
    if options.get("rope_options"):
        found.append("scaled positions (rope_options)")
    if model.model_options.get("model_function_wrapper"):
        found.append("a wrapper around the model (model_function_wrapper)")
    found += [f"a wrapper around the model ({key})" for key in _wrappers(model, AROUND_THE_MODEL)]
    return found + (["hooks"] if model.hook_patches or model.forced_hooks else [])


def steering(model) -> str:
    """A sentence on what is on a MODEL that acts on the sampler, and so on previews but not on training; or nothing."""
    options = model.model_options.get("transformer_options", {})
    found = [name for name in STEERING if model.model_options.get(name)]
    found += ["an attention of its own"] if options.get("optimized_attention_override") else []
    around = [kind for kind in vars(WrappersMP).values() if isinstance(kind, str) and kind not in AROUND_THE_MODEL]
    found += [f"a wrapper of the sampler ({key})" for key in _wrappers(model, around)]
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE):
        found += [f"a callback ({key})" for key in _keys(model, "callbacks", kind)]
    return _only_while_drawing(", ".join(dict.fromkeys(found))) if found else ""


def _wrappers(model, kinds: Iterable[str]) -> list[str]:
    """Those that do more than make it faster."""
    return [key for kind in kinds for key in _keys(model, "wrappers", kind) if key not in FASTER]


def _keys(model, store: str, kind: str) -> list[str]:
    """Of the wrappers or callbacks of a kind that are there, on the MODEL or in its options."""
    both = (getattr(model, store), model.model_options.get("transformer_options", {}).get(store, {}))
    return list(dict.fromkeys(str(key) for one in both for key, there in one.get(kind, {}).items() if there))


def refuse_hooks(clip):
    """Raise ModelError where a CLIP hands hooks on with its CONDITIONING.

    They would be on the model in previews, and not in training.
    """
    if clip is not None and clip.apply_hooks_to_conds:
        raise ModelError(HOOKS)


def injected(patcher) -> Iterator[tuple]:
    """What tells a patcher's injections apart: (name, strength, *tensors) of each LoRA in bypass mode.

    An unknown one gives something that is never the same.
    """
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
