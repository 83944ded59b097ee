"""The velocity of ComfyUI's NextDiT through `block.Block`s: the fast way, where the layers are what those compute.

With the first picture of each shape the same tokens go through NextDiT's own refiners and first layer, and what comes
out is compared: so a NextDiT that was changed is noticed.
"""

from collections.abc import Mapping

import comfy.ldm.lumina.model
import torch

from .. import lowrank
from ..block import Block, Rope, Shape
from ..lowrank import Difference, Factors, Fetch, Target
from ..stack import Stack
from . import comfy_forward, comfy_lend
from .comfy_mode import core_mode, lent

STACKS = {
    "time": ("adaLN_modulation.0",),
    "qkv": ("attention.qkv",),
    "out": ("attention.out",),
    "up": ("feed_forward.w1", "feed_forward.w3"),
    "down": ("feed_forward.w2",),
}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the norm of what NextDiT's own modules give
DEVICES = ("cpu", "cuda", "xpu")
SHAPES = 64  # whose positions are remembered
GROUPS = ("noise_refiner", "layers")  # that the picture's tokens go through
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


class Fast:
    """A NextDiT with a LoRA, loaded. `carry` comes before each velocity."""

    def __init__(self, dit, linears, targets: list[Target], lora: Mapping[str, Difference], like: torch.Tensor):
        """linears, targets: of all blocks, by module. like: a tensor of the compute dtype and device."""
        named = {f"{group}.{n}": layer for group in GROUPS for n, layer in enumerate(getattr(dit, group))}
        self.dit = dit
        self.blocks = blocks(named, linears, targets, lora, like)
        self.layers = [block for name, block in self.blocks.items() if name.startswith("layers.")]
        self.refiners = [block for name, block in self.blocks.items() if not name.startswith("layers.")]
        self.stacks = [stack for block in self.blocks.values() for stack in block.stacks.values()]
        self.ropes: dict[tuple, Rope] = {}
        self.copies: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self.adapter: Mapping[str, Factors] | None = None

    def carry(self, adapter: Mapping[str, Factors]):
        """Take the LoRA's numbers as they are now, and these frozen differences."""
        if adapter is not self.adapter:
            moved = [stack.carry(adapter) for stack in self.stacks]
            self.copies, self.adapter = None if any(moved) else self.copies, adapter
        if self.copies is None:
            pairs = [pair for stack in self.stacks for pair in stack.stale()]
            self.copies = [to for to, _ in pairs], [source for _, source in pairs]
        if self.copies[0]:
            torch._foreach_copy_(*self.copies)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        """As `comfy_forward.velocity`. Raises OtherModel where the layers compute something else than a Block."""
        size, behind = x.shape[2:], caption.shape[1]
        rope = self.rope(x, sigma, caption)
        tokens, t = self.before_layers(x, sigma, caption, rope)
        for block in self.layers[:-1]:
            tokens = block(tokens, t, rope)
        out = self.dit.final_layer(self.layers[-1](tokens, t, rope, start=behind), t)
        return -self.dit.unpatchify(out, [tuple(size)] * len(x), [0] * len(x), return_tensor=True)

    @torch.no_grad()
    def before_layers(
        self, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens [B, T, dim] of caption and picture as the first layer is given them, the embedded time)."""
        image, t = self.embedded(x, sigma)
        turns, back = (one[caption.shape[1] :] for one in rope)
        for block in self.refiners:
            image = block(image, t, (turns, back))
        return torch.cat((caption, image), dim=1), t

    def embedded(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(picture tokens [B, L, dim] in front of the refiners, the embedded time)."""
        dit, side = self.dit, self.dit.patch_size
        batch, channels, height, width = x.shape
        with core_mode():
            patches = x.view(batch, channels, height // side, side, width // side, side)
            image = dit.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
            if image.shape[1] % dit.pad_tokens_multiple:
                image, _ = comfy.ldm.lumina.model.pad_zimage(image, dit.x_pad_token, dit.pad_tokens_multiple)
            t = dit.t_embedder((1.0 - sigma) * dit.time_scale, dtype=x.dtype)
        return lent(image), lent(t)

    def rope(self, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor) -> Rope:
        """Of caption and picture, each [T, 1, d / 2] complex."""
        key = (*x.shape[2:], caption.shape[1])
        if key not in self.ropes:
            if len(self.ropes) == SHAPES:
                self.ropes.pop(next(iter(self.ropes)))
            self.ropes[key] = self.compared(x[:1], sigma[:1], caption[:1])
        return self.ropes[key]

    @torch.no_grad()
    def compared(self, x: torch.Tensor, sigma: torch.Tensor, caption: torch.Tensor) -> Rope:
        """The positions' rope out of NextDiT's own modules, whose tokens are compared with ours."""
        with core_mode():
            before, freqs, t = comfy_forward.before_layers(self.dit, x, sigma, caption)
        before, freqs, t = lent(before), lent(freqs), lent(t)
        theirs = self.dit.layers[0](before, None, freqs, t, transformer_options=comfy_forward.OPTIONS)
        turns = freqs[0, :, :, :, :, 0].contiguous()
        rope = torch.view_as_complex(turns), torch.view_as_complex(turns).conj().resolve_conj()
        tokens, t = self.before_layers(x, sigma, caption, rope)
        ours = self.layers[0](tokens, t, rope)
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < TOLERANCE[x.dtype]:
            raise OtherModel(f"a layer of this model differs by {error:.3g} from the one that is known")
        return rope


class OtherModel(Exception):
    """The fast way does not compute this model."""


def usable(dit, lora: Mapping[str, Difference], device: torch.device) -> str:
    """Why the fast way cannot be gone, or nothing."""
    if device.type not in DEVICES:
        return f"the fast way was never tried on a device of the kind {device.type}"
    if len(lowrank.plain(lora)) < len(lora):
        return "the LoRA is of another kind than lora"
    if not all(fits(layer) for group in GROUPS for layer in getattr(dit, group)):
        return "the layers of this model are built in another way"
    return ""


def fits(layer) -> bool:
    """Is it a layer as `Block` knows it?"""
    attention = getattr(layer, "attention", None)
    return (
        isinstance(layer, comfy.ldm.lumina.model.JointTransformerBlock)
        and layer.modulation
        and len(layer.adaLN_modulation) == 1
        and isinstance(attention.q_norm, torch.nn.RMSNorm)
        and attention.n_local_heads == attention.n_local_kv_heads
    )


def blocks(
    layers: Mapping[str, torch.nn.Module],
    linears: Mapping[str, tuple[torch.nn.Module, Fetch]],
    targets: list[Target],
    lora: Mapping[str, Difference],
    like: torch.Tensor,
) -> dict[str, Block]:
    """A Block for each layer, {name: layer} -> {name: Block}. like: a tensor of the compute dtype and device."""
    by_module = {target.module: target for target in targets}
    found = {}
    for name, layer in layers.items():
        stacks = {
            kind: Stack(
                [(by_module[f"{name}.{one}"], linears[f"{name}.{one}"][1]) for one in modules], lora, like.dtype
            )
            for kind, modules in STACKS.items()
        }
        attention = layer.attention
        norms = torch.stack([weight(getattr(layer, norm), like) for norm in NORMS])
        heads = [
            weight(norm, like).expand(attention.n_local_heads, -1) for norm in (attention.q_norm, attention.k_norm)
        ]
        shape = Shape(attention.n_local_heads, eps(layer.attention_norm1), eps(attention.q_norm))
        found[name] = Block(shape, stacks, norms, torch.cat(heads).float())
    return found


def weight(norm, like: torch.Tensor) -> torch.Tensor:
    """A copy of it; norms are small."""
    with comfy_lend.fetcher(norm)(like) as (lent, _):
        return lent.clone()


def eps(norm) -> float:
    return torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
