"""The de-distill adapter on ComfyUI's MODEL: on at +1, off again at -1, exactly.

The adapter goes on as core's own weight patches, so every core node downstream sees it. A tag on the MODEL
(an attachment, which clones keep) says which adapter it carries and which patches are its; taking it away
removes those very patches, so what is left is the list of patches, and the weights, of before.
"""

import uuid
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora

from .. import lorafile, lowrank
from ..errors import LoraFileError, ModelError
from ..family import Z_IMAGE
from ..lorafile import LoraFile
from ..lowrank import Factors, Target
from . import comfy_added

TAG = "zturbo_adapter"
PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Carried:
    """What a MODEL carries. strength: of the patches; baked: of the adapter that the checkpoint itself contains."""

    file: str
    sha256: str
    factors: dict[str, Factors]
    patches: dict
    strength: float
    baked: float = 0.0

    @property
    def net(self) -> float:
        """Strength of the adapter in the weights that this MODEL computes with; 0: clean turbo."""
        return _exact_zero(self.strength + self.baked)


def _exact_zero(strength: float) -> float:
    return 0.0 if abs(strength) < 1e-6 else strength


def carried(model) -> Carried | None:
    """The adapter that a MODEL carries, if this pack put one on or was told of one."""
    return model.get_attachment(TAG)


def diffusion_model(model):
    """NextDiT inside a MODEL. Raises ModelError when it is another family."""
    dit = getattr(model.model, "diffusion_model", None)
    if type(dit).__name__ != "NextDiT" or getattr(dit, "pad_tokens_multiple", None) is None:
        raise ModelError(_no_z_image(type(model.model).__name__))
    return dit


def linears(dit, blocks: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Name -> Linear, for all Linears whose name begins with one of `blocks`.

    Core's quantised ones are no torch.nn.Linear.
    """
    return {
        name: module
        for name, module in dit.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "weight") and name.startswith(blocks)
    }


def targets(dit, blocks: tuple[str, ...] = Z_IMAGE.blocks) -> list[Target]:
    """Every Linear of the blocks with the LoRAs that live on it."""
    return [
        lorafile.module_targets(name, module.in_features, module.out_features)
        for name, module in linears(dit, blocks).items()
    ]


def apply(model, adapter: LoraFile, file: str, strength: float, baked: float = 0.0):
    """A clone of MODEL whose adapter strength is changed by `strength` (+ de-distills, - restores).

    baked: strength of this adapter that the user declares to be merged into the checkpoint (only for a MODEL
    without a tag). Raises LoraFileError for an adapter that does not fit, another adapter than the one on the
    model, and for taking away what is not there.
    """
    check(model, adapter, file)
    tag = carried(model)
    if tag is not None and tag.sha256 != adapter.sha256:
        raise LoraFileError(_another_on(tag, file))
    if tag is None and strength < 0 and not baked:
        raise LoraFileError(_none_on(file))
    has = tag.net if tag is not None else baked
    if strength < 0 and _exact_zero(has + strength) < 0:
        raise LoraFileError(_too_little_on(file, has, -strength))
    if tag is None:
        tag = Carried(file, adapter.sha256, plain(adapter), _core_patches(model, adapter), 0.0, baked)
    changed = model.clone()
    _set_strength(changed, replace(tag, strength=_exact_zero(tag.strength + strength)))
    return changed


def check(model, adapter: LoraFile, file: str):
    """Raise LoraFileError unless every key of the adapter has its place in the model."""
    if adapter.leftover:
        raise LoraFileError(_not_whole(file, adapter))
    if len(plain(adapter)) < len(adapter.factors):
        raise LoraFileError(_not_plain(file))
    lorafile.check_fit(adapter.factors, targets(diffusion_model(model)), file)


def plain(adapter: LoraFile) -> dict[str, Factors]:
    """What of the file is plain LoRA."""
    return lowrank.plain(adapter.factors)


def clean(model):
    """A clone of MODEL without the adapter: what previews are drawn with. The MODEL itself where nothing is carried."""
    tag = carried(model)
    if tag is None or tag.net == 0:
        return model
    restored = model.clone()
    _set_strength(restored, replace(tag, strength=_exact_zero(-tag.baked)))
    return restored


def alike(one, other) -> bool:
    """Do two MODELs compute with the same module under the same patches, and nothing but them?"""
    if one.model is not other.model or _patches(one) != _patches(other):
        return False
    return comfy_added.unseen(one) == comfy_added.unseen(other) == []


def _patches(model) -> dict:
    """Weight key -> (strength, which patch) of each."""
    return {key: [(entry[0], id(entry[1])) for entry in entries] for key, entries in model.patches.items()}


def without_adapter(model):
    """A clone of MODEL with the adapter's patches off its weights, and others' still on.

    It is for carrying the adapter as a branch instead.
    """
    tag = carried(model)
    bare = model.clone()
    if tag is not None:
        _set_strength(bare, replace(tag, strength=0.0))
    return bare


def _core_patches(model, adapter: LoraFile) -> dict:
    """Core's patch objects for the adapter: {weight key, or (key, slice): adapter}."""
    state = lorafile.state_dict(adapter.factors, next(iter(plain(adapter).values())).A.dtype)
    patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
    if len(patches) != len(adapter.factors):
        raise LoraFileError(_not_all_applied(len(patches), len(adapter.factors)))
    return patches


def _set_strength(model, tag: Carried):
    """Give the adapter's patches on this (freshly cloned) MODEL the tag's strength.

    They stay in their places, are new at the end, or gone at 0.
    """
    own = {id(patch) for patch in tag.patches.values()}
    found = 0
    for key, entries in list(model.patches.items()):
        kept = []
        for entry in entries:
            if id(entry[1]) not in own:
                kept.append(entry)
                continue
            found += 1
            if tag.strength != 0:
                kept.append((tag.strength, *entry[1:]))
        if kept:
            model.patches[key] = kept
        else:
            del model.patches[key]
    if found == 0 and tag.strength != 0:
        model.add_patches(tag.patches, tag.strength)
    elif found not in (0, len(own)):
        raise ModelError(_patches_removed(found, len(own)))
    model.patches_uuid = uuid.uuid4()
    if tag.strength == 0 and tag.baked == 0:
        model.remove_attachments(TAG)
    else:
        model.set_attachments(TAG, tag)


# What is said of a model and an adapter's file


def _no_z_image(name: str) -> str:
    return f"The model is {name}, not Z-Image. Load Z-Image-Turbo (z_image_turbo_bf16.safetensors)."


def _another_on(tag: Carried, file: str) -> str:
    return (
        f"This model carries the adapter {tag.file} at {tag.net:+g}; {file} is another one. "
        "Use the same file to take it away, then put the other one on."
    )


def _none_on(file: str) -> str:
    return (
        f"This model carries no adapter, so {file} cannot be taken away from it: the result would be a broken model. "
        "Turbo weights are clean as they are: draw with them directly. "
        "If this checkpoint has the adapter merged in, say so with checkpoint_has_adapter."
    )


def _too_little_on(file: str, has: float, wanted: float) -> str:
    return (
        f"This model carries {file} at {has:+g}, so {wanted:g} of it cannot be taken away. "
        f"Set strength to {has:g} for clean turbo weights."
    )


def _not_whole(file: str, adapter: LoraFile) -> str:
    examples = ", ".join(adapter.leftover[:3])
    return (
        f"{len(adapter.leftover)} keys of {file} are not understood (for example {examples}); "
        f"{len(adapter.factors)} are. An adapter must fit whole: choose the right file."
    )


def _not_plain(file: str) -> str:
    return f"{file} is no plain LoRA (it has DoRA, LoKr or LoHa parts). The de-distill adapter is one: choose its file."


def _not_all_applied(applied: int, matrices: int) -> str:
    return (
        f"ComfyUI applies {applied} of the adapter's {matrices} matrices to this model. "
        "Choose a file that was made for it."
    )


def _patches_removed(left: int, put_on: int) -> str:
    return (
        f"Only {left} of the adapter's {put_on} patches are left on this model: another node removed the rest. "
        "Load the model anew."
    )
