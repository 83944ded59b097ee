"""LoRA files under names and in files that people have, through Convert LoRA in a real ComfyUI."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_server import drawn_by_core, failure

from zturbo import lorafile
from zturbo.hosts import comfy_tiny

DOWN, UP = "lora_down.weight", "lora_up.weight"
NAMES = {  # (what stands before the name, with which dots, A's ending, B's ending)
    "two_underscores": ("lora_unet__", "_", DOWN, UP),
    "onetrainer_two": ("lora_transformer__", "_", DOWN, UP),
    "lycoris_two": ("lycoris__", "_", DOWN, UP),
    "core_in_kohya": ("lora_unet_diffusion_model_", "_", DOWN, UP),
    "checkpoint_in_kohya": ("lora_unet_model_diffusion_model_", "_", DOWN, UP),
    "compiled_kohya": ("lora_unet__orig_mod_", "_", DOWN, UP),
    "compiled": ("transformer._orig_mod.", ".", "lora_A.weight", "lora_B.weight"),
    "several_cards": ("module.", ".", "lora_A.weight", "lora_B.weight"),
    "peft_named": ("base_model.model.", ".", "lora_A.my_adapter.weight", "lora_B.my_adapter.weight"),
    "peft_numbered": ("transformer.", ".", "lora_A.default_0.weight", "lora_B.default_0.weight"),
    "unet": ("unet.", ".", "lora.down.weight", "lora.up.weight"),
    "dit": ("dit.", ".", "lora_A", "lora_B"),
    "net": ("net.", ".", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}


def named(way: str) -> dict[str, torch.Tensor]:
    front, dot, down, up = NAMES[way]
    factors = lorafile.read(comfy_tiny.ADAPTER).factors
    return {f"{front}{name.replace('.', dot)}.{ending}": tensor.clone() for name, one in factors.items() for ending, tensor in ((down, one.A), (up, one.B))}


def convert(file: str, name: str) -> dict:
    return prompts.node("ZTurboConvertLoRA", file=f"{file}.safetensors", name=name, rank=0, dtype="bf16", overwrite=True)


def test_every_trainers_way_to_write_a_name_is_read(server):
    """Each gives the bytes of the LoRA itself, and the picture that core draws with that."""
    loras = server.base / "models" / "loras"
    native = lorafile.state_dict(lorafile.read(comfy_tiny.ADAPTER).factors, torch.bfloat16)
    lorafile.write(loras / "names_native.safetensors", native, {})
    for way in NAMES:
        save_file(named(way), loras / f"names_{way}.safetensors")
    server.run({way: convert(f"names_{way}", f"names/{way}") for way in NAMES})
    for way in NAMES:
        made = load_file(loras / "names" / f"{way}.safetensors")
        assert made.keys() == native.keys() and all(torch.equal(made[key], native[key]) for key in native), way
    assert drawn_by_core(server, "names_native") == drawn_by_core(server, "names/two_underscores") != drawn_by_core(server, "names_two_underscores")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:2407613050b809ffdff18a4ac99af83ea6b95443ecebdf80e064a79c825574a6\nsize 340000000\n"
BROKEN = {
    "pointer": (LFS, "is a Git LFS pointer: 134 bytes of text that stand for the file"),
    "page": (b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>", "is a web page, saved under this name"),
    "nothing": (b"", "is empty"),
    "answer": (b'{"error": "Unauthorized"}', "holds no weights, but the words"),
    "pickle": (b"\x80\x02}q\x00" + bytes(400), "is a PyTorch file under the name of a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(400), "is a PyTorch file under the name of a safetensors file"),
    "archive": (b"PK\x03\x04" + bytes(26) + b"lora.safetensors" + bytes(400), "is a ZIP archive under the name of a safetensors file"),
    "cut": (None, "is cut off: it has"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_lora_that_is_another_kind_of_file_is_named(server, what):
    """In Convert LoRA, and in front of training."""
    content, sentence = BROKEN[what]
    path = server.base / "models" / "loras" / f"broken_{what}.safetensors"
    path.write_bytes(comfy_tiny.ADAPTER.read_bytes()[:-1000] if content is None else content)
    assert f"{path.name} {sentence}" in failure(server, {"convert": convert(path.stem, "no")})
    graph = {"load": prompts.load(), "adapter": prompts.adapter(["load", 0], name=path.name), "sample": prompts.sample(["adapter", 0]), "save": prompts.save_image(["sample", 0])}
    assert f"{path.name} {sentence}" in failure(server, graph)


def test_a_text_encoders_lora_is_said_to_be_one(server):
    text = {f"lora_te_layers_0_self_attn_{letter}_proj.{ending}": torch.ones(2, 2) for letter in "qkv" for ending in (DOWN, UP)}
    save_file(text, server.base / "models" / "loras" / "only_text.safetensors")
    assert "holds no LoRA for Z-Image: none of its 6 keys is one" in (said := failure(server, {"convert": convert("only_text", "no")}))
    assert "Of these are 6 text encoder parts." in said
