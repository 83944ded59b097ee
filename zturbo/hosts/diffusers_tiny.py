"""The bundled tiny Z-Image in diffusers' and transformers' classes, from the same files as in ComfyUI.

diffusers fixes two widths that the tiny model has smaller: the feed-forward (8/3 of the width), which is replaced, and
the time embedder's 1024 hidden units, which are filled up with zeros.
"""

import torch
import torch.nn.functional as F

from .diffusers_load import QWEN3, Autoencoder, Loaded, TextEncoder, bundled_tokenizer, read
from .tiny import ADAPTER as ADAPTER
from .tiny import MODEL as MODEL
from .tiny import PICTURES as PICTURES
from .tiny import VAE as VAE
from .tiny import config as config
from .tiny import text_encoder_weights

NAMES = (
    "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "qk_norm", "cap_feat_dim",
    "rope_theta", "axes_dims", "axes_lens",
)  # fmt: skip
TIME_UNITS = 1024


def load(dtype: torch.dtype = torch.float32) -> Loaded:
    return Loaded(load_transformer(dtype), load_text_encoder(), load_autoencoder())


def load_transformer(dtype: torch.dtype):
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
    from diffusers.models.transformers.transformer_z_image import FeedForward

    settings, state = config()["unet_config"], read(MODEL)
    model = ZImageTransformer2DModel(**{name: settings[name] for name in NAMES}, t_scale=settings["time_scale"])
    hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
    for blocks in (model.layers, model.noise_refiner, model.context_refiner):
        for block in blocks:
            block.feed_forward = FeedForward(settings["dim"], hidden)
    state = convert_z_image_transformer_checkpoint_to_diffusers(state)
    extra = TIME_UNITS - state["t_embedder.mlp.0.weight"].shape[0]
    for key, padding in (
        ("t_embedder.mlp.0.weight", (0, 0, 0, extra)),
        ("t_embedder.mlp.0.bias", (0, extra)),
        ("t_embedder.mlp.2.weight", (0, extra)),
    ):
        state[key] = F.pad(state[key], padding)
    model.load_state_dict(state)
    return (model if dtype is torch.float32 else model.to(dtype)).eval().requires_grad_(False)


def load_text_encoder() -> TextEncoder:
    """Its frozen random weights, the same as in ComfyUI."""
    from transformers import Qwen3Config, Qwen3Model

    model = Qwen3Model(Qwen3Config(**QWEN3, **config()["text_encoder"], pad_token_id=None)).eval().requires_grad_(False)
    model.load_state_dict(text_encoder_weights())
    return TextEncoder(model, bundled_tokenizer())


def load_autoencoder() -> Autoencoder:
    from diffusers import AutoencoderTiny

    model, state = AutoencoderTiny(latent_channels=16), {}
    for key, value in read(VAE).items():
        side, _, rest = key.partition(".")
        if side == "taesd_encoder":
            state[f"encoder.layers.{rest}"] = value
        elif side == "taesd_decoder":  # diffusers' decoder has no module for the clamp in front
            number, _, leaf = rest.partition(".")
            state[f"decoder.layers.{int(number) - 1}.{leaf}"] = value
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return Autoencoder(model.eval().requires_grad_(False), 1.0, 0.0)  # its latents are in the model's space as they are
