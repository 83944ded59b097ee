"""The bundled tiny turbo in diffusers' own Z-Image: another implementation of the same maths, from the same file."""

import torch
from torch import nn


def build(dit, config: dict):
    """diffusers' ZImageTransformer2DModel with NextDiT's weights.

    diffusers fixes two widths that NextDiT derives: the feed-forward (8/3 dim) is replaced by one of the
    right width, and the time embedder's 1024 hidden units are filled up with zeros.
    """
    import comfy.utils
    from diffusers import ZImageTransformer2DModel
    from diffusers.models.transformers.transformer_z_image import FeedForward

    names = (
        "in_channels",
        "dim",
        "n_layers",
        "n_refiner_layers",
        "n_heads",
        "n_kv_heads",
        "qk_norm",
        "cap_feat_dim",
        "rope_theta",
        "axes_dims",
        "axes_lens",
    )
    twin = ZImageTransformer2DModel(**{name: config[name] for name in names}, t_scale=config["time_scale"])
    hidden = dit.layers[0].feed_forward.w1.out_features
    for blocks in (twin.layers, twin.noise_refiner, twin.context_refiner):
        for block in blocks:
            block.feed_forward = FeedForward(config["dim"], hidden)
    state = {}
    source = dit.state_dict()
    for key, place in comfy.utils.z_image_to_diffusers(config).items():
        name, rows = (place[0], place[1]) if isinstance(place, tuple) else (place, None)
        if name in source:
            tensor = source[name]
            state[key] = (tensor.narrow(*rows) if rows else tensor).float().clone()
    width = source["t_embedder.mlp.0.weight"].shape[0]
    for key, extra in (
        ("t_embedder.mlp.0.weight", (0, 0, 0, 1024 - width)),
        ("t_embedder.mlp.0.bias", (0, 1024 - width)),
        ("t_embedder.mlp.2.weight", (0, 1024 - width)),
    ):
        state[key] = nn.functional.pad(state[key], extra)
    twin.load_state_dict(state)
    return twin.requires_grad_(False)


def velocity(twin, x: torch.Tensor, sigma: torch.Tensor, captions: list[torch.Tensor]) -> torch.Tensor:
    """v = eps - x0 at x [B, 16, H, W], sigma [B], captions B x [L, C]; diffusers gives -v at time 1 - sigma."""
    out = twin([picture[:, None] for picture in x], 1 - sigma, captions, return_dict=False)[0]
    return -torch.stack([picture[:, 0] for picture in out])


def load_lora(twin, state: dict[str, torch.Tensor]):
    """Through diffusers' own conversion and PEFT loading."""
    from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin

    converted = ZImageLoraLoaderMixin.lora_state_dict({key: value.clone() for key, value in state.items()})
    ZImageLoraLoaderMixin.load_lora_into_transformer(converted, transformer=twin)
    return converted
