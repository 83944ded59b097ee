"""Z-Image in diffusers' and transformers' own classes, from a diffusers folder or from single files as in ComfyUI.

Nothing is fetched: every file is on this machine. The bundled tiny model loads here, too (`diffusers_tiny`).
"""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import modelfile
from ..errors import ModelError

QUANTISED = ("comfy_quant", "scale_weight", "weight_scale", "scaled_fp8")  # ends of the names of what only core reads
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# of Qwen's tokenizer (Apache 2.0); its vocabulary follows from them
MERGES = Path(__file__).with_name("qwen_merges.txt.xz")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAYER = -2  # hidden states of the text encoder that Z-Image reads
TRANSFORMER = {"cap_feat_dim": 2560, "n_layers": 30, "n_refiner_layers": 2}  # the rest are diffusers' defaults
TEXT_ENCODER = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "attention_bias": False,
}
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass
class Autoencoder:
    """Pictures to latents in the model's own space, and back."""

    module: Any  # AutoencoderKL or AutoencoderTiny
    scale: float = AUTOENCODER["scaling_factor"]
    shift: float = AUTOENCODER["shift_factor"]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 16, H/8, W/8] fp32 on the CPU of pixels [B, H, W, 3] in 0..1."""
        found = self.module.encode(self._given(pixels.movedim(-1, 1) * 2 - 1))
        raw = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return ((raw.float() - self.shift) * self.scale).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 3] fp32 in 0..1 on the CPU of latents [B, 16, h, w]."""
        images = self.module.decode(self._given(latents / self.scale + self.shift)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu()

    def _given(self, x: torch.Tensor) -> torch.Tensor:
        parameter = next(self.module.parameters())
        return x.to(parameter.device, parameter.dtype)


@dataclass
class TextEncoder:
    """Texts to features, as Z-Image reads them."""

    module: Any  # transformers' Qwen3Model
    tokenizer: Any

    @torch.no_grad()
    def encode(self, text: str) -> torch.Tensor:
        """[1, tokens, C] fp32 on the CPU."""
        numbers = self.tokenizer.encode(TEMPLATE.format(text), add_special_tokens=False)
        tokens = torch.tensor([numbers], device=self.module.device)
        return self.module(input_ids=tokens, output_hidden_states=True).hidden_states[LAYER].float().cpu()


@dataclass
class Loaded:
    """Z-Image's parts. transformer: ZImageTransformer2DModel."""

    transformer: Any
    text_encoder: TextEncoder
    autoencoder: Autoencoder


def load(
    transformer: Path, text_encoder: Path, autoencoder: Path, tokenizer: Path | None, dtype: torch.dtype
) -> Loaded:
    """From folders of diffusers' form or single files, each. tokenizer: its folder, or None. Raises ModelError."""
    model = load_transformer(transformer, dtype)
    encoder = TextEncoder(load_text_encoder(text_encoder, dtype), load_tokenizer(tokenizer, text_encoder))
    return Loaded(model, encoder, load_autoencoder(autoencoder, dtype))


def load_transformer(path: Path, dtype: torch.dtype):
    """ZImageTransformer2DModel, frozen. Raises ModelError for what is not Z-Image."""
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    if path.is_dir():
        return from_folder(ZImageTransformer2DModel, path, dtype)
    state = under(modelfile.MODEL, read(path))
    width = state.get("cap_embedder.1.weight")
    if width is None or width.shape[0] != 3840 or not any(key.startswith("layers.29.attention.") for key in state):
        raise ModelError(f"{path.name} is not Z-Image. Choose z_image_turbo_bf16.safetensors.")
    if any(key.endswith(QUANTISED) for key in state):
        raise ModelError(_quantised(path.name))
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**TRANSFORMER)
    if "layers.29.attention.qkv.weight" in state:  # ComfyUI's names
        state = convert_z_image_transformer_checkpoint_to_diffusers(state)
    return filled(model, state, path, dtype)


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What lies under a prefix, without it; all of it where nothing does."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)} or state


def load_text_encoder(path: Path, dtype: torch.dtype):
    """Qwen3Model, frozen."""
    from transformers import Qwen3Config, Qwen3Model

    if path.is_dir():
        return from_folder(Qwen3Model, path, dtype)
    state = {key.removeprefix("model."): value for key, value in read(path).items() if not key.startswith("lm_head.")}
    if "layers.35.self_attn.q_norm.weight" not in state:
        raise ModelError(f"{path.name} is no text encoder of Z-Image. Choose qwen_3_4b.safetensors.")
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**QWEN3, **TEXT_ENCODER))
    model.rotary_emb = type(model.rotary_emb)(model.config)  # its table is no weight, so no file fills it
    return filled(model, state, path, dtype)


def load_tokenizer(named: Path | None, text_encoder: Path):
    """The named folder's, else the one that lies in or beside the text encoder, else the bundled one.

    They are the same in all of Z-Image.
    """
    from transformers import AutoTokenizer

    places = (named,) if named else (text_encoder, text_encoder.parent, text_encoder.parent / "tokenizer")
    folder = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    if folder:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if named:
        raise ModelError(_no_tokenizer(named))
    return bundled_tokenizer()


def bundled_tokenizer():
    """Qwen's: a byte's letter for each of 256 bytes, then a word for each merge, then the special ones."""
    from transformers import Qwen2Tokenizer

    merges = lzma.decompress(MERGES.read_bytes()).decode().splitlines()
    words = [*letters(), *(merge.replace(" ", "") for merge in merges), *SPECIAL]
    return Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        additional_special_tokens=list(SPECIAL),
    )


def letters() -> list[str]:
    """The byte-level alphabet of GPT-2's tokenizer.

    Printable bytes stand for themselves, the others for letters from 256 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(code) for code in (*plain, *range(256, 256 + len(others)))]


def load_autoencoder(path: Path, dtype: torch.dtype) -> Autoencoder:
    """Flux' autoencoder, which is Z-Image's."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if path.is_dir():
        return Autoencoder(from_folder(AutoencoderKL, path, dtype))
    state = read(path)
    if not any("encoder.down.0" in key or "encoder.down_blocks.0" in key for key in state):
        raise ModelError(f"{path.name} is no VAE. Choose Z-Image's (ae.safetensors).")
    with torch.device("meta"):
        model = AutoencoderKL(**AUTOENCODER)
    if any("encoder.down.0" in key for key in state):  # ComfyUI's names
        state = convert_ldm_vae_checkpoint(state, model.config)
    return Autoencoder(filled(model, state, path, dtype))


def from_folder(kind, path: Path, dtype: torch.dtype):
    """A model that diffusers or transformers saved."""
    config = path / "config.json"
    try:
        named = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(_no_config(path, error)) from error
    said = str(named.get("_class_name") or (named.get("architectures") or [""])[0]) if isinstance(named, dict) else ""
    if not said.startswith(kind.__name__.removesuffix("Model")):
        raise ModelError(f"{path} holds a {said or 'model without a name'}; here belongs a {kind.__name__}.")
    try:
        return kind.from_pretrained(path, torch_dtype=dtype, local_files_only=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = f"The model in {path} cannot be loaded ({error}). Give the whole folder, with its weights."
        raise ModelError(said) from error


def filled(model, state: dict[str, torch.Tensor], path: Path, dtype: torch.dtype):
    """A model made on the meta device with a file's weights, frozen. Raises ModelError unless they fit whole."""
    try:
        model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path.name} does not fit {type(model).__name__}: {error}") from error
    return model.eval().requires_grad_(False)


def read(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file. Raises ModelError."""
    modelfile.read(path)  # which says what is wrong with a file that is none
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Give the path of a whole file.") from error


# What is said of files and folders


def _quantised(file: str) -> str:
    return (
        f"{file} is quantised, which diffusers' code cannot load. "
        "Choose z_image_turbo_bf16.safetensors, or train with --host comfy or inside ComfyUI."
    )


def _no_tokenizer(folder: Path) -> str:
    return (
        f"There is no tokenizer_config.json in {folder}. "
        "Give the tokenizer folder of Z-Image-Turbo, or leave it out: Qwen's is bundled."
    )


def _no_config(folder: Path, error: Exception) -> str:
    return (
        f"{folder} holds no config.json that can be read ({error}). "
        "Give the folder transformer, text_encoder or vae of Z-Image-Turbo in diffusers' form."
    )
