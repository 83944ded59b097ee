"""Random weights at Z-Image's real shapes and names, as files of the kinds that ComfyUI loads.

Shapes are those of ComfyUI's own classes on the meta device, so they are asked for where Linears have weights:
without dynamic VRAM.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

# What core detects of the real file, and nothing of it is in a file of ours.
FULL = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
    "n_refiner_layers": 2, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
MODELS = {"bf16": "z_image_turbo_bf16.safetensors", "fp8": "z_image_turbo_fp8_e4m3fn.safetensors"}
TEXT_ENCODER, ADAPTER = "qwen_3_4b.safetensors", "adapter.safetensors"
PREFIX = "model.diffusion_model."  # in front of the names in the real file
ROOM = 30e9  # bytes that the files take, roughly
RANK = 16
Shapes = dict[str, tuple[int, ...]]


def on_meta():
    """ComfyUI's `ZImage` at the real size without a byte of weights."""
    import comfy.supported_models

    config = comfy.supported_models.ZImage(dict(FULL))
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device="meta")


def shapes(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def text_encoder_shapes() -> Shapes:
    """Of Qwen3-4B."""
    import comfy.ops
    from comfy.text_encoders.llama import Qwen3_4B

    return shapes(Qwen3_4B({}, torch.bfloat16, "meta", comfy.ops.disable_weight_init))


def adapter_shapes(dit) -> Shapes:
    """Of a de-distill adapter on every matrix of the layers."""
    from zturbo.hosts import comfy_adapter

    found: Shapes = {}
    for target in comfy_adapter.targets(dit, ("layers.",)):
        for part in target.parts:
            found[f"diffusion_model.{part.name}.lora_A.weight"] = (RANK, target.in_features)
            found[f"diffusion_model.{part.name}.lora_B.weight"] = (part.size, RANK)
    return found


def fill(wanted: Shapes, device: torch.device) -> dict[str, torch.Tensor]:
    """Random bf16 weights on the CPU, small enough that activations stay finite: norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(0)
    return {name: one(name, shape, device, generator) for name, shape in wanted.items()}


def one(name: str, shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, 1.0 if "norm" in name else 0.0, dtype=torch.bfloat16)
    scale = 0.7 * shape[-1] ** -0.5
    return (torch.randn(shape, device=device, generator=generator) * scale).to(torch.bfloat16).cpu()


def as_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as float8_e4m3fn, the rest as it is."""
    return {name: w.to(torch.float8_e4m3fn) if w.ndim == 2 else w for name, w in weights.items()}


def write(folder: Path, device: torch.device) -> dict[str, int]:
    """All files into the folder. Returns how many tensors each has."""
    model = on_meta().diffusion_model
    weights = {PREFIX + name: w for name, w in fill(shapes(model), device).items()}
    save_file(weights, folder / MODELS["bf16"])
    small = as_fp8(weights)
    counts = {"model": len(weights), "parameters": sum(w.numel() for w in weights.values())}
    del weights
    save_file(small, folder / MODELS["fp8"])
    del small
    for name, wanted in ((TEXT_ENCODER, text_encoder_shapes()), (ADAPTER, adapter_shapes(model))):
        save_file(fill(wanted, device), folder / name)
        counts[name] = len(wanted)
    return counts
