"""Loading Z-Image from the files that ComfyUI users have, through core's own loaders, and refusing what is not Z-Image.

Core decides what a diffusion model is: its loader builds it, and the class that it built is what is looked at.
A second detection beside core's would refuse what core reads. What is said of other files is core's word, too,
asked of their headers.
"""

import contextlib
import logging
import math
import re
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

from .. import modelfile
from ..errors import ModelError
from ..memory import Need
from ..modelfile import Header
from . import comfy_memory, comfy_tiny, devices, room

log = logging.getLogger("zturbo")

ZIMAGE = comfy.supported_models.ZImage
CHOOSE_MODEL = "Choose Z-Image-Turbo (z_image_turbo_bf16.safetensors)."
CHOOSE_CLIP = "Choose qwen_3_4b.safetensors."
CHOOSE_VAE = "Choose Z-Image's VAE (ae.safetensors)."
CUT_OUT = "Something was cut out of it: choose a whole one"
NO_TURBO = (
    "%s seems to be a Z-Image that was never distilled, or is not any more. "
    "Train on it without the de-distill adapter, and give Train LoRA the turbo model as preview_model."
)
TEXT_ENCODER = f"{ZIMAGE.text_encoder_key_prefix[0]}qwen3_4b.transformer."  # in front of its names in a checkpoint
VAE = ZIMAGE.vae_key_prefix[0]
Z_IMAGE, QWEN, A_VAE = "a diffusion model (ZImage)", "a text encoder (QWEN3_4B)", "a VAE"  # as `_kind` says it
RELATIVES = {
    "ZImagePixelSpace": "a Z-Image that draws pixels without a VAE",
    "Lumina2": "Lumina 2 or a model built like it, of which Z-Image is a relative",
}
ADAPTERS = ("lora", "lokr_", "hada_", "oft_", "boft_", ".diff_b")
CONTROLS = ("control_all_x_embedder", "control_layers.", "controlnet_")
DECODERS = ("decoder.", "taesd_decoder.", "first_stage_model.", VAE)
UNDISTILLED = re.compile(r"de[-_ ]?turbo|de[-_ ]?distill|z[-_ ]?image[-_ ]?(base|omni|edit)", re.IGNORECASE)


def load(model: Path, text_encoder: Path | None = None, vae: Path | None = None) -> tuple:
    """(MODEL, CLIP, VAE) from files. None: the one that comes with the model, bundled or in its checkpoint.

    Raises ZTurboError where main memory cannot hold them.
    """
    device = comfy.model_management.get_torch_device()
    beside = [path for path in (text_encoder, vae) if path is not None and path.is_file()]
    others = [Need(path.name, path.stat().st_size) for path in beside]
    dtype, weights = _weights(model, device, others)
    room.check_files(device, [weights, *others])
    clip = decoder = None
    if text_encoder is not None and (model == comfy_tiny.MODEL or _kind(modelfile.read(model)) == Z_IMAGE):
        clip = _text_encoder_aside(text_encoder)  # before the model needs the room; else the model is what is refused
    if model == comfy_tiny.MODEL:
        loaded = comfy_tiny.load_model(model)
        clip, decoder = clip or comfy_tiny.load_clip(), load_vae(comfy_tiny.VAE) if vae is None else None
    else:
        loaded, own_clip, decoder = load_checkpoint(model, clip=text_encoder is None, vae=vae is None, dtype=dtype)
        clip = clip or own_clip
    if clip is None and text_encoder is not None:
        clip = _text_encoder_aside(text_encoder)
    return loaded, clip, decoder if vae is None else load_vae(vae)


def _text_encoder_aside(path: Path):
    """CLIP whose weights lie in their file, where it would wait in main memory."""
    clip = load_clip(path)
    comfy_memory.to_file(clip.patcher)
    return clip


def own_parts(model: Path) -> tuple[bool, bool]:
    """Whether a text encoder and a VAE come with a model. Raises ModelError when its file cannot be read."""
    if model == comfy_tiny.MODEL:
        return True, True
    header = modelfile.read(model)
    return header.has(TEXT_ENCODER), header.has(VAE)


def load_model(path: str | Path, dtype: torch.dtype | None = None):
    """MODEL from a diffusion model's file or a checkpoint.

    Raises ModelError, naming what was found, unless it is Z-Image.
    """
    return load_checkpoint(path, clip=False, vae=False, dtype=dtype)[0]


def _weights(path: Path, device: torch.device, others: list[Need]) -> tuple[torch.dtype | None, Need]:
    """(the weights' dtype where it is not core's choice, what they take).

    On a CPU core makes fp32 out of bf16; where that does not fit, they stay as they are in the file and become fp32 as
    they are used: the same numbers.
    """
    header = modelfile.read(path)
    kinds = {tensor.dtype for tensor in header.tensors.values()}
    if not devices.shares_main_memory(device) or not kinds <= {"BF16", "F16"}:
        return None, Need(path.name, path.stat().st_size)
    own = torch.bfloat16 if kinds == {"BF16"} else torch.float16
    numbers = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    chosen = comfy.model_management.unet_dtype(device, numbers, ZIMAGE.supported_inference_dtypes, own)
    grown = Need(path.name, numbers * chosen.itemsize)
    if room.fits_main_memory([grown, *others]) or chosen.itemsize <= own.itemsize:
        return None, grown
    return own, Need(path.name, numbers * own.itemsize)


def load_checkpoint(path: str | Path, clip: bool = True, vae: bool = True, dtype: torch.dtype | None = None) -> tuple:
    """(MODEL, CLIP, VAE) from a diffusion model's file or a checkpoint of several parts.

    CLIP and VAE are None where the file holds none, or where it is not wanted. dtype: of the weights; None: as core
    chooses. Raises ModelError unless it is Z-Image.
    """
    header = modelfile.read(path)
    clip, vae = clip and header.has(TEXT_ENCODER), vae and header.has(VAE)
    options = {} if dtype is None else {"dtype": dtype}
    with _refusing(header, Z_IMAGE, CHOOSE_MODEL):
        if clip or vae:
            model, text_encoder, decoder, _ = comfy.sd.load_checkpoint_guess_config(
                str(path), output_vae=vae, output_clip=clip, embedding_directory=_embeddings(), model_options=options
            )
        else:
            model, text_encoder, decoder = comfy.sd.load_diffusion_model(str(path), model_options=options), None, None
    _check_model(model, header)
    if text_encoder is not None:
        _check_clip(text_encoder, header, TEXT_ENCODER)
    if decoder is not None:
        _check_vae(decoder, header)
    return model, text_encoder, decoder


def load_clip(path: str | Path):
    """CLIP from a Qwen3-4B file. Raises ModelError for any other."""
    header = modelfile.read(path)
    if _text_encoder(header) is not comfy.sd.TEModel.QWEN3_4B:
        found = _kind(header) or "nothing that ComfyUI knows"
        raise ModelError(f"{header.path.name} is no text encoder of Z-Image, but {found}. {CHOOSE_CLIP}")
    with _refusing(header, QWEN, CHOOSE_CLIP):
        clip = comfy.sd.load_clip([str(path)], embedding_directory=_embeddings(), clip_type=comfy.sd.CLIPType.LUMINA2)
    _check_clip(clip, header)
    return clip


def load_vae(path: str | Path):
    """VAE from a Flux (`ae.safetensors`, or diffusers' names) or TAESD file. Raises ModelError for any other."""
    header = modelfile.read(path)
    with _refusing(header, A_VAE, CHOOSE_VAE):
        state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        vae = comfy.sd.VAE(sd=state, metadata=metadata)
        vae.throw_exception_if_invalid()
    _check_vae(vae, header)
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (str(path), metadata, None))  # as core's node does
    return vae


def fingerprint(path: str | Path | None) -> str:
    """Changes when the file does."""
    if path is None or not Path(path).is_file():
        return "missing"
    stat = Path(path).stat()
    return f"{stat.st_mtime_ns}:{stat.st_size}"


@contextlib.contextmanager
def _refusing(header: Header, wanted: str, choose: str):
    """Core raises exceptions of many kinds for files of the wrong kind: it looks at names without asking what is there.

    wanted: what `_kind` says of the right file, which then fails for another reason.
    """
    try:
        yield
    except Exception as error:
        name, kind, reason = header.path.name, _kind(header), f"{type(error).__name__}: {error}"
        if kind == wanted:
            raise ModelError(f"{name} cannot be loaded ({reason}). Free some memory, or download it again.") from error
        what = kind or f"nothing of that kind that ComfyUI knows ({reason})"
        raise ModelError(f"{name} is {what}. {choose}") from error


def _check_model(model, header: Header):
    config, name = model.model.model_config, header.path.name
    if type(config) is not ZIMAGE:
        family = type(config).__name__
        raise ModelError(f"{name} is {RELATIVES.get(family, f'a {family} model')}, not Z-Image. {CHOOSE_MODEL}")
    _check_whole(model.model.diffusion_model, _names_in_core(header, config.unet_config), header, "Z-Image")
    said = [name, *(value for key, value in header.words.items() if "title" in key or "name" in key)]
    if config.unet_config.get("siglip_feat_dim") or UNDISTILLED.search(" ".join(said)):
        log.info(NO_TURBO, name)


def _names_in_core(header: Header, unet_config: dict) -> set[str]:
    """The names of a diffusion model's file as core's model has them: without a prefix, and not diffusers'."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(header.tensors)
    given = {name.removeprefix(prefix) for name in header.tensors}
    table = comfy.utils.z_image_to_diffusers(unet_config)
    return given | {place if isinstance(place, str) else place[0] for name, place in table.items() if name in given}


def _check_whole(module, given: set[str], header: Header, what: str):
    """Core loads what is there, and leaves the rest of a model as the memory happened to be."""
    wanted = [f"{name}.weight" for name, part in module.named_modules() if hasattr(part, "in_features")]
    missing = [name for name in wanted if name not in given]
    if missing:
        part = modelfile.part_of_several(header.path)
        why = f"It is part {part}: choose the model in one file" if part else CUT_OUT
        lacks = f"{len(missing)} of the {len(wanted)} matrices of {what} (for example {missing[0]})"
        raise ModelError(f"{header.path.name} lacks {lacks}. {why}.")


def _check_clip(clip, header: Header, prefix: str = ""):
    given = {name.removeprefix(prefix) for name in header.tensors}
    _check_whole(clip.cond_stage_model.qwen3_4b.transformer, given, header, "Qwen3-4B")


def _check_vae(vae, header: Header):
    if (vae.latent_channels, vae.latent_dim) != (16, 2):
        latents = f"{vae.latent_channels} channels in {vae.latent_dim} dimensions, and Z-Image's have 16 in 2"
        raise ModelError(f"{header.path.name} is a VAE of another model: its latents have {latents}. {CHOOSE_VAE}")


def _embeddings() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


# What a file of the wrong kind is


def _kind(header: Header) -> str:
    """In words, and nothing where core knows no more than that it is none of these."""
    part = modelfile.part_of_several(header.path)
    if part:
        return f"part {part} of a model in several files"
    if any(mark in name for name in header.tensors for mark in ADAPTERS):
        return "a LoRA or adapter"
    if any(name.startswith(CONTROLS) for name in header.tensors):
        return "a ControlNet"
    text_encoder, model = _text_encoder(header), _diffusion_model(header)
    if text_encoder is not None:
        return f"a text encoder ({text_encoder.name})"
    if model:
        return f"a diffusion model ({model})"
    return A_VAE if any(header.has(prefix) for prefix in DECODERS) else ""


def _on_meta(header: Header) -> dict[str, torch.Tensor]:
    """Names and shapes, for core's detections: they look at no number that these words need."""
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in header.tensors.items()}


def _text_encoder(header: Header):
    """Core's TEModel, or None."""
    with contextlib.suppress(Exception):  # core looks at shapes without asking whether they are there
        return comfy.sd.detect_te_model(_on_meta(header))


def _diffusion_model(header: Header) -> str:
    """The name of core's class for it, or nothing."""
    with contextlib.suppress(Exception):
        state, prefix = _on_meta(header), modelfile.MODEL if header.has(modelfile.MODEL) else ""
        config = comfy.model_detection.model_config_from_unet(state, prefix)
        return "" if config is None else type(config).__name__
    return ""
