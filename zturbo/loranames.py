"""Names in LoRA files: whose they are, which Linear they mean, and what is no LoRA but is read by core ComfyUI.

A trainer's key is `<stem><ending>`. The stem is a way through the model, with dots or underscores, behind what the
trainer, PEFT, torch.compile or a wrapper for several cards put in front of it or in between.
"""

import re
from collections import Counter
from collections.abc import Iterable

PREFIXES = {  # of a key -> who writes it
    "diffusion_model.": "ComfyUI, ai-toolkit",
    "model.diffusion_model.": "ComfyUI",
    "transformer.": "diffusers, OneTrainer",
    "base_model.model.": "PEFT",
    "pipe.dit.": "DiffSynth",
    "lora_unet_": "kohya, musubi-tuner",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS, SimpleTuner",
}
FRONT = re.compile(
    r"^(?:_|(?:lora_unet|lora_transformer|lycoris|base_model|diffusion_model|model|transformer|pipe|unet|dit|net)_)+"
)
# torch.compile's and DistributedDataParallel's own
WRAPPER = re.compile(r"(?:^|_)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?=_)")
ENDINGS = {  # our name of a part -> how a key with it may end
    "lora_A.weight": (
        ".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
        ".lora_linear_layer.down.weight", ".lora_A",
    ),
    "lora_B.weight": (
        ".lora_B.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight",
        ".lora_linear_layer.up.weight", ".lora_B",
    ),
    "alpha": (".alpha",),
    "dora_scale": (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
} | {name: (f".{name}",) for name in (
    "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
)}  # fmt: skip
# PEFT's own name of it, as `default`, stands within
OF_AN_ADAPTER = re.compile(
    r"(.+?)(\.lora_[AB]|\.lora_magnitude_vector|\.(?:lokr|hada)_\w+)\.(?!weight$|bias$)[^.]+(\.weight)?"
)
MATRICES = {leaf: leaf for leaf in (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "attention.qkv",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
)} | {"attention.out": "attention.to_out.0"}  # fmt: skip
OUTSIDE = {  # Linears outside the blocks, by ComfyUI's names -> ours, which are diffusers'
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
} | {name: name for name in (
    "all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1",
    "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2",
)}  # fmt: skip
NORMS = {leaf: leaf for leaf in (
    "attention.q_norm", "attention.k_norm", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2",
)} | {"attention.norm_q": "attention.q_norm", "attention.norm_k": "attention.k_norm"}  # fmt: skip
ALONE = {name: name for name in ("cap_embedder.0", "x_pad_token", "cap_pad_token")}  # outside the blocks, and no Linear
BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)_(\d+)_(.+)")
# what core reads beside LoRAs, by how its key ends: (of a Linear, of a norm)
CHANGES = {
    ".diff": ("whole matrix", "norm"),
    ".set_weight": ("whole matrix", "norm"),
    ".w_norm": ("whole matrix", "norm"),
    ".diff_b": ("bias", "bias"),
    ".b_norm": ("bias", "bias"),
    ".alpha": ("scale", ""),
    ".dora_scale": ("scale", ""),
    ".oft_blocks": ("OFT part", ""),
    ".rescale": ("OFT part", ""),
} | {f".{name}.weight": ("GLoRA part", "") for name in ("a1", "a2", "b1", "b2")}
TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:lora_(?:prior_)?te\d?_|(?:text_encoders?|text_model|te\d?|conditioner|cond_stage_model)(?:_\d)?\.)"
)
BUNDLED = "bundle_emb."  # OneTrainer's embeddings, trained beside the LoRA
# names of those that core has a place for in Z-Image's text encoder
OF_QWEN = re.compile(r"lora_te_layers_|text_encoders\.")
PLURALS = {
    "whole matrix": "whole matrices",
    "bias": "biases",
    "matrix of q, k and v together": "matrices of q, k and v together",
}


def _by_flat(table: dict[str, str]) -> dict[str, str]:
    return {name.replace(".", "_"): place for name, place in table.items()}


OURS = (_by_flat(MATRICES), _by_flat(OUTSIDE))
CORES = (
    _by_flat({name: "attention.out" if place == "attention.to_out.0" else place for name, place in MATRICES.items()}),
    _by_flat({name: core for core, ours in OUTSIDE.items() if not core.startswith("all_") for name in (core, ours)}),
)
CORES_NORMS = (_by_flat(NORMS), _by_flat(ALONE))


def kind(key: str) -> tuple[str, str]:
    """(our name of the part, stem)."""
    if named := OF_AN_ADAPTER.fullmatch(key):
        key = "".join(filter(None, named.groups()))
    for part, endings in ENDINGS.items():
        for ending in endings:
            if key.endswith(ending):
                return part, key.removesuffix(ending)
    return "", ""


def canonical(stem: str) -> str | None:
    """`lora_unet_layers_0_attention_to_q`, `transformer.layers.0.attention.to_q`, … -> `layers.0.attention.to_q`."""
    return _place(stem, *OURS)


def _place(stem: str, inside: dict[str, str], outside: dict[str, str]) -> str | None:
    flat = FRONT.sub("", WRAPPER.sub("", stem.replace(".", "_")))
    block = BLOCK.fullmatch(flat)
    if block is None:
        return outside.get(flat)
    leaf = inside.get(block[3])
    return leaf and f"{block[1]}.{block[2]}.{leaf}"


def dialect(keys: Iterable[str]) -> str:
    """Whose names these are, for people: `lora_unet_… (kohya, musubi-tuner)`."""
    keys = list(keys)
    found = [f"{prefix}… ({who})" for prefix, who in PREFIXES.items() if any(key.startswith(prefix) for key in keys)]
    return " and ".join(found) or "bare names"


def is_peft(keys: Iterable[str]) -> bool:
    return any("base_model.model." in key for key in keys)


def aside(key: str) -> tuple[str, str]:
    """(what it is in a word, the name under which core reads it) of a key that is no LoRA of Z-Image.

    Such a key has a place beside a LoRA; for any other both are empty. A text encoder's may have no name.
    """
    if key.startswith(BUNDLED):
        return "bundled embedding", ""
    if TEXT_ENCODER.match(key):
        return "text encoder part", key if OF_QWEN.match(key) else ""
    for ending, (matrix, norm) in CHANGES.items():
        if key.endswith(ending):
            stem = key.removesuffix(ending)
            if place := _place(stem, *CORES):
                split = place.rpartition(".")[2] in ("to_q", "to_k", "to_v")
                return (matrix, "" if matrix == "bias" and split else f"diffusion_model.{place}{ending}")
            if norm and (place := _place(stem, *CORES_NORMS)):
                return norm, f"diffusion_model.{place}{ending}"
    return "", ""


def changes(key: str) -> str | None:
    """The Linear, by our name, that a key changes in a form that is no LoRA."""
    of_matrices = (ending for ending, (matrix, _) in CHANGES.items() if matrix not in ("bias", "scale"))
    ending = next(filter(key.endswith, of_matrices), "")
    return canonical(key.removesuffix(ending)) if ending else None


def counted(words: Iterable[str]) -> str:
    """`12 norms, 1 bias`, the most frequent first."""
    return ", ".join(
        f"{count} {word if count == 1 else PLURALS.get(word, f'{word}s')}"
        for word, count in Counter(words).most_common()
    )
