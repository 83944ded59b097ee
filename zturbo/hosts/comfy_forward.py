"""The velocity of ComfyUI's NextDiT, differentiable, split where Z-Image training wants it split.

Nothing in front of `layers.0` carries a LoRA, so it needs no gradient; and the refined caption does not
depend on the noise, so it is computed once. Both halves call NextDiT's own methods.
"""

from contextlib import nullcontext

import comfy.ldm.modules.attention
import torch
import torch.utils.checkpoint

from .comfy_mode import core_mode, lent


def differentiable_attention(_chosen, *args, **kwargs):
    """PyTorch's own attention, whatever the user chose for drawing: the others have no backward or a slow one."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


OPTIONS = {"optimized_attention_override": differentiable_attention}


def refine_caption(dit, features: torch.Tensor) -> torch.Tensor:
    """Caption features [B, L, cap_feat_dim] -> refined tokens [B, ceil(L/32)*32, dim], as `layers.0` sees them."""
    with core_mode():
        (tokens,), (freqs,), _ = dit.embed_cap(features, device=features.device, dtype=features.dtype)
        for layer in dit.context_refiner:
            tokens = layer(tokens, None, freqs, transformer_options=OPTIONS)
    return lent(tokens)


def velocity(
    dit, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor, run_layer=None, grad_before_layers=False
) -> torch.Tensor:
    """v = eps - x0 of NextDiT at noised latents.

    x: [B, 16, H, W] in model space (after `process_latent_in`), H and W even; sigma: [B] in [0, 1];
    caption: [B, L, dim] from `refine_caption`. `run_layer(layer, *args)` lets the caller checkpoint.
    """
    run_layer = run_layer or (lambda layer, *args, **options: layer(*args, **options))
    batch, _, height, width = x.shape
    with nullcontext() if grad_before_layers else core_mode():
        tokens, rope, t = before_layers(dit, x, sigma, caption)
    if not grad_before_layers:
        tokens, rope, t = lent(tokens), lent(rope), lent(t)
    for layer in dit.layers:
        tokens = run_layer(layer, tokens, None, rope, t, transformer_options=OPTIONS)
    out = dit.final_layer(tokens, t)
    return -dit.unpatchify(out, [(height, width)] * batch, [caption.shape[1]] * batch, return_tensor=True)


def checkpointed(layer, *args, **options):
    """Run a layer, keep only its input, and run it again in backward."""
    return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, **options)


def before_layers(
    dit, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [B, L, dim] of caption and picture, their rope, the embedded time) as `layers.0` is given them."""
    t = dit.t_embedder((1.0 - sigma) * dit.time_scale, dtype=x.dtype)
    # embed_all without a caption stands in one padding block: the offset moves the picture behind the real caption
    embeds, freqs, _ = dit.embed_all(x, offset=caption.shape[1] - dit.pad_tokens_multiple)
    image, image_freqs = embeds[-1], freqs[-1]
    caption_ids = torch.zeros(1, caption.shape[1], 3, device=x.device)
    caption_ids[:, :, 0] = torch.arange(caption.shape[1], device=x.device) + 1.0
    caption_freqs = dit.rope_embedder(caption_ids).movedim(1, 2)
    for layer in dit.noise_refiner:
        image = layer(image, None, image_freqs, t, transformer_options=OPTIONS)
    return torch.cat((caption, image), dim=1), torch.cat((caption_freqs, image_freqs), dim=1), t
