"""The bundled tiny Z-Image, as every host loads it: its files, its sizes, its text encoder's frozen random weights."""

import json
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
MODEL = FOLDER / "z_image_turbo_tiny.safetensors"
ADAPTER = FOLDER / "z_image_turbo_tiny_adapter.safetensors"
VAE = FOLDER / "vae.safetensors"
PICTURES = FOLDER / "smiley"
VOCABULARY, HEAD = 151936, 128  # of Qwen3, at every size


def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def text_encoder_shapes() -> dict[str, tuple[int, ...]]:
    """Qwen3's names and shapes at the tiny size."""
    c = config()["text_encoder"]
    width, inner = c["hidden_size"], c["intermediate_size"]
    queries, keys = c["num_attention_heads"] * HEAD, c["num_key_value_heads"] * HEAD
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (HEAD,),
        "self_attn.k_norm": (HEAD,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    numbers = range(c["num_hidden_layers"])
    layers = {f"layers.{n}.{name}.weight": shape for n in numbers for name, shape in layer.items()}
    return {"embed_tokens.weight": (VOCABULARY, width), "norm.weight": (width,), **layers}


def text_encoder_weights() -> dict[str, torch.Tensor]:
    """Name -> fp32 tensor, drawn in the order of names from one seed.

    Norms are 1, embeddings N(0, 1), matrices N(0, 1/in).
    """
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(config()["text_encoder_seed"])
        return {name: _drawn(name, shape, generator) for name, shape in sorted(text_encoder_shapes().items())}


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) < 2:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * (1.0 if "embed" in name else shape[1] ** -0.5)
