"""LoRA files under names and in files that people have, through Convert LoRA in a real ComfyUI."""

import io
import sys
from pathlib import Path

import comfy.lora
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_server import drawn_by_core, failure

from zturbo import lorafile
from zturbo.errors import LoraFileError
from zturbo.hosts import comfy_draw, comfy_tiny

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
    return {
        f"{front}{name.replace('.', dot)}.{ending}": tensor.clone()
        for name, one in factors.items()
        for ending, tensor in ((down, one.A), (up, one.B))
    }


def convert(file: str, name: str) -> dict:
    return prompts.node(
        "ZTurboConvertLoRA", file=f"{file}.safetensors", name=name, rank=0, dtype="bf16", overwrite=True
    )


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
    assert (
        drawn_by_core(server, "names_native")
        == drawn_by_core(server, "names/two_underscores")
        != drawn_by_core(server, "names_two_underscores")
    )


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:2407613050b809ffdff18a4ac99af83ea6b95443ecebdf80e064a79c825574a6\n"
    b"size 340000000\n"
)
BROKEN = {
    "pointer": (LFS, "is a Git LFS pointer: 134 bytes of text that stand for the file"),
    "page": (
        b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>",
        "is a web page, saved under this name",
    ),
    "nothing": (b"", "is empty"),
    "answer": (b'{"error": "Unauthorized"}', "holds no weights, but the words"),
    "pickle": (b"\x80\x02}q\x00" + bytes(400), "is a PyTorch file under the name of a safetensors file"),
    "zip": (
        b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(400),
        "is a PyTorch file under the name of a safetensors file",
    ),
    "archive": (
        b"PK\x03\x04" + bytes(26) + b"lora.safetensors" + bytes(400),
        "is a ZIP archive under the name of a safetensors file",
    ),
    "cut": (None, "is cut off: it has"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_lora_that_is_another_kind_of_file_is_named(server, what):
    """In Convert LoRA, and in front of training."""
    content, sentence = BROKEN[what]
    path = server.base / "models" / "loras" / f"broken_{what}.safetensors"
    path.write_bytes(comfy_tiny.ADAPTER.read_bytes()[:-1000] if content is None else content)
    assert f"{path.name} {sentence}" in failure(server, {"convert": convert(path.stem, "no")})
    graph = {
        "load": prompts.load(),
        "adapter": prompts.adapter(["load", 0], name=path.name),
        "sample": prompts.sample(["adapter", 0]),
        "save": prompts.save_image(["sample", 0]),
    }
    assert f"{path.name} {sentence}" in failure(server, graph)


def test_a_text_encoders_lora_is_said_to_be_one(server):
    text = {
        f"lora_te_layers_0_self_attn_{letter}_proj.{ending}": torch.ones(2, 2)
        for letter in "qkv"
        for ending in (DOWN, UP)
    }
    save_file(text, server.base / "models" / "loras" / "only_text.safetensors")
    assert "holds no LoRA for Z-Image: none of its 6 keys is one" in (
        said := failure(server, {"convert": convert("only_text", "no")})
    )
    assert "Of these are 6 text encoder parts." in said


CONNECTED = "the one connected"
PICTURE = "a large zsmile on a blue background"


def core_trains(algorithm: str) -> dict:
    """A graph in which core's own Train LoRA learns, is saved by core and by us, and draws."""
    fixed = {
        "batch_size": 1,
        "steps": 2,
        "grad_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "rank": 2,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
    }
    fixed |= {
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": algorithm,
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
    }
    return {
        "load": prompts.load(),
        "text": prompts.node("CLIPTextEncode", clip=["load", 1], text=PICTURE),
        "latents": prompts.node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "train": prompts.node(
            "TrainLoraNode",
            model=["load", 0],
            latents=["latents", 0],
            positive=["text", 0],
            existing_lora="[None]",
            bucket_mode=False,
            bypass_mode=False,
            **fixed,
        ),
        "raw": prompts.node("SaveLoRA", lora=["train", 0], prefix=f"raw/{algorithm}"),
        "put": prompts.node("LoraModelLoader", model=["load", 0], lora=["train", 0], strength_model=1.0, bypass=False),
        "sample": prompts.sample(["put", 0], prompt=PICTURE),
        "picture": prompts.save_image(["sample", 0]),
        "save": prompts.node(
            "ZTurboSaveLoRA", lora=["train", 0], name=f"of_core/{algorithm}", dtype="fp32", overwrite=True
        ),
    }


def changed(model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight that core's loader changes with a LoRA file's tensors, as it computes with it."""
    with torch.inference_mode():
        patched = comfy_draw.with_lora(model, state)
        weights = dict(model.model.named_parameters())
        return {
            key: comfy.lora.calculate_weight(patches, weights[key].clone().float(), key)
            for key, patches in patched.patches.items()
        }


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "OFT"])
def test_a_lora_of_cores_own_trainer_is_saved_as_it_is(server, tiny, algorithm, caplog):
    """Norms and biases with the matrices.

    Core's loader makes the same weights of the file, and core draws the same picture.
    """
    outputs = server.run(core_trains(algorithm))
    raw = max((server.base / "output" / "raw").glob(f"{algorithm}_*.safetensors"))
    ours = load_file(server.base / "models" / "loras" / "of_core" / f"{algorithm}.safetensors")
    (text,) = outputs["save"]["text"]
    assert "Only ComfyUI reads all of it: kept under its names are " in text and "norms" in text and "biases" in text
    expected, got = changed(tiny[0], load_file(raw)), changed(tiny[0], ours)
    assert "lora key not loaded" not in caplog.text and "NOT LOADED" not in caplog.text
    assert got.keys() == expected.keys() and len(got) > 50
    assert all(torch.allclose(got[key], expected[key], atol=1e-6) for key in got)
    assert sum(not torch.equal(weight, dict(tiny[0].model.named_parameters())[key]) for key, weight in got.items()) > 50
    picture = (
        server.base
        / "output"
        / outputs["picture"]["images"][0]["subfolder"]
        / outputs["picture"]["images"][0]["filename"]
    ).read_bytes()
    drawn = [
        np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)
        for png in (picture, drawn_by_core(server, f"of_core/{algorithm}"))
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].std() > 5


def test_convert_lora_takes_the_matrices_of_cores_trainer_and_counts_the_rest(server):
    server.run(core_trains("LoRA"))
    raw = max((server.base / "output" / "raw").glob("LoRA_*.safetensors"))
    source = load_file(raw)
    text = {f"lora_te_layers_0_self_attn_q_proj.{ending}": torch.ones(2, 2) for ending in (DOWN, UP)}
    save_file(source | text, server.base / "models" / "loras" / "core_trained.safetensors")
    (report,) = server.run({"convert": convert("core_trained", "core_converted")})["convert"]["text"]
    norms = sum(key.endswith(".diff") for key in source)
    biases = sum(key.endswith(".diff_b") for key in source)
    assert f"Left out are {norms} norms, {biases} biases, 2 text encoder parts" in report
    assert "none: the same numbers" in report or "of the whole" in report
    made = load_file(server.base / "models" / "loras" / "core_converted.safetensors")
    assert len([key for key in made if key.endswith("lora_A.weight")]) == sum(
        3 if "attention.qkv" in key else 1 for key in source if key.endswith(DOWN)
    )
    save_file(
        source | {"diffusion_model.layers.0.attention.qkv.nonsense": torch.ones(2)},
        server.base / "models" / "loras" / "core_garbage.safetensors",
    )
    said = failure(server, {"convert": convert("core_garbage", "no")})
    assert "1 keys are not (for example diffusion_model.layers.0.attention.qkv.nonsense)" in said


def test_what_core_does_not_read_either_is_refused():
    state = lorafile.state_dict(lorafile.read(comfy_tiny.ADAPTER).factors, torch.float32)
    for key in (
        "diffusion_model.layers.0.attention.qkv.nonsense",
        "diffusion_model.layers.0.no_norm.diff",
        "diffusion_model.layers.0.attention.to_q.diff_b",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    ):
        with pytest.raises(LoraFileError, match=f"1 keys are not .for example {key}"):
            lorafile.whole_state(lorafile.of_state(state | {key: torch.ones(2)}, "it"), torch.bfloat16, "it")


def test_turbo_health_reads_a_lora_of_cores_trainer(server):
    """From the wire, and from a file that has a text encoder's parts as well: the same reading."""
    graph = core_trains("LoRA") | {
        "health": prompts.node(
            "ZTurboHealth",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            file=CONNECTED,
            lora=["train", 0],
            prompts="a dog",
            size=64,
            seed=0,
        )
    }
    (wired,) = server.run(graph)["health"]["text"]
    source = load_file(max((server.base / "output" / "raw").glob("LoRA_*.safetensors")))
    save_file(
        source | {f"lora_te1_self_attn_q_proj.{ending}": torch.ones(2, 2) for ending in (DOWN, UP)},
        server.base / "models" / "loras" / "core_read.safetensors",
    )
    health = prompts.node(
        "ZTurboHealth",
        model=["load", 0],
        clip=["load", 1],
        vae=["load", 2],
        file="core_read.safetensors",
        prompts="a dog",
        size=64,
        seed=0,
    )
    (filed,) = server.run({"load": prompts.load(), "health": health, "look": prompts.save_image(["health", 3])})[
        "health"
    ]["text"]
    assert filed.startswith(wired.splitlines()[0]) and "Turbo wear 0.00" not in wired
    assert "Left out of the LoRA are 2 text encoder parts." in filed and "Left out" not in wired
