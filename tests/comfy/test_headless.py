"""The same recipe on both hosts: ComfyUI's code and diffusers', from the same files."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_full_size import FULL
from test_host import de_distilled

import dev
from zturbo import cli, dataset, lorafile, network, recipefile, roles, runlog, trainer
from zturbo.cli import hosts
from zturbo.errors import LoraFileError, ModelError, ZTurboError
from zturbo.hosts import comfy_draw, comfy_forward, comfy_tiny, diffusers_load, diffusers_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.hosts.diffusers import DiffusersHost
from zturbo.recipe import AdapterCourse, Compute, Data, Inputs, Network, Optimizer, Previews, Recipe, Turbo, teaches
from zturbo.runfolder import RunFolder

TEXTS = ("a large zsmile on a blue background", "Ein schönes Bild, 日本 🎨!", "", "x  y\n\n12345")
UNRELATED = tuple(
    f"a large {color} star on a {ground} background"
    for color in ("red", "blue", "green")
    for ground in ("white", "pink", "gray", "black")
)
LOSSES = 1e-5  # relative, over the first 20 steps in fp32
NUMBERS = 5e-3  # relative, of a LoRA's matrices after 20 steps
PIXELS = 12, 0.5  # of 255: at most, and on average


@pytest.fixture(scope="module")
def loaded():
    return diffusers_tiny.load()


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_text_features_latents_and_pictures_are_those_of_comfyui(loaded, tiny):
    model, clip, vae = tiny
    with torch.inference_mode():
        for text in TEXTS:
            ours, theirs = loaded.text_encoder.encode(text), comfy_draw.encode_prompt(clip, text)[0][0].float()
            assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-5, text
        pixels = torch.rand(1, 128, 112, 3, generator=torch.Generator().manual_seed(0))
        raw = vae.encode(pixels)
        latents = model.model.process_latent_in(raw).float()
        assert relative(loaded.autoencoder.encode(pixels), latents) < 1e-5
        assert (loaded.autoencoder.decode(latents) - vae.decode(raw)).abs().max() < 1e-4


def test_captions_of_any_length_share_a_batch(loaded, tiny):
    """Each picture's velocity is what NextDiT gives it alone."""
    with torch.inference_mode(False), torch.no_grad():
        host = DiffusersHost(loaded, Recipe(compute=Compute("fp32", False)), torch.device("cpu"))
        host.encode_texts(["zsmile", "a very " * 20])
        x, sigma = torch.randn(2, 16, 18, 14, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
        with host.training({}) as velocity:
            both = velocity(x, sigma, (0, 1))
        dit = tiny[0].model.diffusion_model
        alone = [
            comfy_forward.velocity(
                dit, x[n : n + 1], sigma[n : n + 1], comfy_forward.refine_caption(dit, host.features[n])
            )
            for n in range(2)
        ]
    assert relative(both, torch.cat(alone)) < 1e-4


def recipe(way="auto", **changes) -> Recipe:
    settings = {
        "network": Network(8, 8),
        "optimizer": Optimizer(learning_rate=1e-3),
        "compute": Compute("fp32", False, way),
        "data": Data(cache=False, flip=True),
        "previews": Previews(TEXTS[:1], 0, 128, 112, seed=3),
        "turbo": Turbo(every=10, prompts=UNRELATED),
    }
    return Recipe("both", 20, 2, **{**settings, **changes})


def trained(host, given: Recipe, folder: Path) -> tuple[trainer.Result, RunFolder]:
    run = RunFolder.new(folder, given)
    with torch.inference_mode(False), torch.enable_grad():
        return trainer.train(
            given,
            dataset.from_folder(comfy_tiny.PICTURES, (128,), "zsmile", given.data),
            host,
            run,
            roles.Unattended(),
            {},
        ), run


def headless(loaded, given: Recipe) -> DiffusersHost:
    return DiffusersHost(loaded, given, torch.device("cpu"), lorafile.read(diffusers_tiny.ADAPTER), 1.0, "tiny")


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("branch", {}),
        ("merged", {"turbo": Turbo("guard", every=10, prompts=UNRELATED)}),
        ("merged", {"turbo": Turbo("restore", every=10, prompts=UNRELATED, restore_steps=8)}),
        ("branch", {"adapter": AdapterCourse(1.0, 0.0), "network": Network(8, 8, "dora")}),
    ],
    ids=["branch", "merged and guarded", "restored", "fading DoRA"],
)
def test_one_recipe_trains_the_same_lora_on_both(loaded, tiny, tmp_path, way, changes):
    given = recipe(way, **changes)
    before = [parameter.clone() for parameter in loaded.transformer.parameters()]
    with torch.inference_mode(False):
        comfy = ComfyHost(de_distilled(tiny[0]), *tiny[1:], given)
    there, _ = trained(comfy, given, tmp_path)
    here, _ = trained(headless(loaded, given), given, tmp_path)
    assert max(abs(a - b) / a for a, b in zip(there.losses, here.losses)) < LOSSES
    assert there.state.keys() == here.state.keys()
    assert (
        max(relative(here.state[key].float(), value.float()) for key, value in there.state.items() if value.any())
        < NUMBERS
    )
    apart = np.abs(there.images[0].astype(int) - here.images[0].astype(int))
    assert apart.max() <= PIXELS[0] and apart.mean() <= PIXELS[1]
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.transformer.parameters()))  # clean weights stay clean


def test_one_lora_file_draws_the_same_on_both(loaded, tiny):
    given = recipe()
    lora = network.create(headless(loaded, given).targets, given.network, 0)
    for name, part in lora.items():
        part.B.data = 0.3 * torch.randn(part.B.shape, generator=torch.Generator().manual_seed(len(name)))
    state, pictures = (
        lorafile.state_dict(lora, torch.float32),
        dataset.from_arrays([np.zeros((64, 64, 3), np.uint8)], ["a"], (64,)),
    )
    with torch.inference_mode(False):
        hosts = [ComfyHost(tiny[0], *tiny[1:], given), headless(loaded, given)]
        for host in hosts:
            host.encode(pictures, pictures.captions())
        there, here = (host.draw(state)[0].astype(int) for host in hosts)
        plain = hosts[1].draw({})[0].astype(int)
    assert np.abs(there - here).max() <= 2 and np.abs(plain - here).mean() > 5


def test_recomputing_changes_no_loss(loaded, tmp_path):
    given = recipe("branch")
    plain, _ = trained(headless(loaded, given), given, tmp_path)
    thrifty = replace(given, compute=replace(given.compute, checkpointing=True))
    again, _ = trained(headless(loaded, thrifty), thrifty, tmp_path)
    assert again.losses == pytest.approx(plain.losses, rel=1e-6)


class Cancelled(roles.Unattended):
    steps = 0

    def check(self):
        if self.steps >= 9:
            raise KeyboardInterrupt

    def step(self, event):
        self.steps += 1


def test_a_headless_run_that_was_cut_off_goes_on_to_the_same_bits(loaded, tmp_path):
    given = recipe(turbo=Turbo("restore", every=10, prompts=UNRELATED, restore_steps=12))
    whole, _ = trained(headless(loaded, given), given, tmp_path)
    run, pictures = (
        RunFolder.new(tmp_path, given),
        dataset.from_folder(comfy_tiny.PICTURES, (128,), "zsmile", given.data),
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, pictures, headless(loaded, given), run, Cancelled(), {})
    again = trainer.train(given, pictures, headless(loaded, given), RunFolder(run.path), roles.Unattended(), {})
    assert again.losses == whole.losses and all(torch.equal(again.state[key], whole.state[key]) for key in whole.state)


def test_what_is_no_zimage_gets_a_sentence(loaded, tmp_path):
    with pytest.raises(ModelError, match="not Z-Image"):
        diffusers_load.load_transformer(diffusers_tiny.VAE, torch.float32)
    with pytest.raises(ModelError, match="no text encoder"):
        diffusers_load.load_text_encoder(diffusers_tiny.VAE, torch.float32)
    with pytest.raises(ModelError, match="no VAE"):
        diffusers_load.load_autoencoder(diffusers_tiny.MODEL, torch.float32)
    with pytest.raises(ModelError, match="tokenizer"):
        diffusers_load.load_tokenizer(tmp_path, tmp_path)
    with pytest.raises(ModelError, match="config.json"):
        diffusers_load.load_transformer(tmp_path, torch.float32)
    with pytest.raises(ModelError, match="whole file"):
        diffusers_load.load_transformer(tmp_path / "none.safetensors", torch.float32)
    stem = "diffusion_model.layers.77.attention.to_q"
    state = {f"{stem}.lora_A.weight": torch.zeros(2, 256), f"{stem}.lora_B.weight": torch.zeros(256, 2)}
    with pytest.raises(LoraFileError):
        DiffusersHost(loaded, recipe(), torch.device("cpu"), lorafile.of_state(state, "x"), 1.0, "x")


def test_a_diffusers_folder_loads_like_the_single_file(loaded, tmp_path):
    """What diffusers saves of the tiny transformer and autoencoder is what a folder gives back."""
    loaded.autoencoder.module.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match="AutoencoderKL"):
        diffusers_load.load_autoencoder(tmp_path / "vae", torch.float32)
    loaded.text_encoder.module.save_pretrained(tmp_path / "text_encoder")
    loaded.text_encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = diffusers_load.TextEncoder(
        diffusers_load.load_text_encoder(tmp_path / "text_encoder", torch.float32),
        diffusers_load.load_tokenizer(None, tmp_path / "text_encoder"),
    )
    for text in TEXTS:
        assert torch.equal(again.encode(text), loaded.text_encoder.encode(text))


def test_a_folder_of_several_files_loads_like_the_single_file(loaded, tmp_path):
    """Hugging Face's form of large models: shards and an index."""
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        dim=256, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=64
    )
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="5MB")
    loaded.text_encoder.module.save_pretrained(tmp_path / "text_encoder", max_shard_size="10MB")
    assert all(
        len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
        and list((tmp_path / part).glob("*.safetensors.index.json"))
        for part in ("transformer", "text_encoder")
    )
    again = (
        diffusers_load.load_transformer(tmp_path / "transformer", torch.float32).state_dict(),
        diffusers_load.load_text_encoder(tmp_path / "text_encoder", torch.float32).state_dict(),
    )
    for there, here in zip(again, (transformer.state_dict(), loaded.text_encoder.module.state_dict())):
        assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here)
    next((tmp_path / "transformer").glob("*-00002-of-*")).unlink()
    with pytest.raises(ModelError, match="cannot be loaded .*Give the whole folder, with its weights"):
        diffusers_load.load_transformer(tmp_path / "transformer", torch.float32)


def test_a_folder_of_all_parts_is_one_option(tmp_path, monkeypatch):
    for part in ("transformer", "text_encoder", "vae", "tokenizer"):
        (tmp_path / part).mkdir()
    args = SimpleNamespace(model=str(tmp_path), vae="my_vae", host="comfy")
    found = hosts.given(Inputs(), args)
    assert (found.model, found.text_encoder, found.vae, found.tokenizer) == (
        str(tmp_path / "transformer"),
        str(tmp_path / "text_encoder"),
        "my_vae",
        str(tmp_path / "tokenizer"),
    )
    with pytest.raises(ZTurboError, match="is a folder.*--host diffusers"):
        hosts.choose(args, found)
    args.host = "auto"
    assert hosts.choose(args, found) == "diffusers"


def shapes(module) -> dict[str, torch.Tensor]:
    return {key: tensor.to("meta") for key, tensor in module.state_dict().items()}


def test_the_real_single_files_fill_diffusers_classes(comfyui, monkeypatch):
    """Names and shapes as ComfyUI has them, on the meta device; what does not fit raises."""
    import comfy.ops
    import comfy.supported_models
    import comfy.text_encoders.llama as llama

    with torch.device("meta"):
        dit = comfy.supported_models.ZImage(dict(FULL)).get_model({}, "", device="meta").diffusion_model
        qwen = llama.Qwen3_4B({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    files = {
        "z_image_turbo_bf16": {f"model.diffusion_model.{key}": value for key, value in shapes(dit).items()},
        "qwen_3_4b": shapes(qwen),
    }
    monkeypatch.setattr(diffusers_load, "read", lambda path: dict(files[path.stem]))
    transformer = diffusers_load.load_transformer(Path("z_image_turbo_bf16.safetensors"), torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(6.15e9, rel=0.01) and all(
        p.dtype == torch.bfloat16 for p in transformer.parameters()
    )
    text_encoder = diffusers_load.load_text_encoder(Path("qwen_3_4b.safetensors"), torch.bfloat16)
    assert sum(p.numel() for p in text_encoder.parameters()) == pytest.approx(4.02e9, rel=0.01)
    assert len(text_encoder.layers) == 36 and text_encoder.rotary_emb.inv_freq.device.type == "cpu"


def test_the_real_vae_encodes_and_decodes_as_comfyui_does(comfyui, tmp_path):
    """Flux' autoencoder of full size with random weights, through ae.safetensors' names."""
    import comfy.latent_formats
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    sizes = dict(
        double_z=True,
        z_channels=16,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_resolutions=[],
        dropout=0.0,
    )
    torch.manual_seed(0)
    with torch.inference_mode(False):
        state = {
            f"{side}.{key}": tensor.contiguous()
            for side, module in (("encoder", Encoder(**sizes)), ("decoder", Decoder(**sizes)))
            for key, tensor in module.state_dict().items()
        }
    for key, tensor in state.items():
        if tensor.ndim == 4:
            state[key] = torch.randn(tensor.shape) * tensor[0].numel() ** -0.5
        else:
            state[key] = (torch.ones_like if "norm" in key and key.endswith("weight") else torch.zeros_like)(tensor)
    save_file(state, tmp_path / "ae.safetensors")
    with torch.inference_mode():
        theirs, ours = (
            comfy.sd.VAE(sd=dict(state)),
            diffusers_load.load_autoencoder(tmp_path / "ae.safetensors", torch.float32),
        )
        pixels = torch.rand(1, 64, 48, 3)
        raw = theirs.encode(pixels)
        latents = ours.encode(pixels)
        assert relative(latents, comfy.latent_formats.Flux().process_in(raw).float()) < 1e-4
        assert (ours.decode(latents) - theirs.decode(raw)).abs().max() < 1e-3


def losses_of(run: Path) -> list[float]:
    return [event["loss"] for event in runlog.read_events(run / "events.jsonl") if "loss" in event]


def sampled(host: str, lora: Path, folder: Path) -> np.ndarray:
    command = [
        "sample",
        "--model",
        "tiny",
        "--lora",
        str(lora),
        "--prompt",
        TEXTS[0],
        "--size",
        "128x112",
        "--seed",
        "3",
        "--out",
        str(folder),
        "--host",
        host,
        "--json",
    ]
    with torch.inference_mode(False), redirect_stdout(io.StringIO()):
        assert cli.main(command) == 0
    with Image.open(next(folder.glob("*.png"))) as image:
        return np.asarray(image).astype(int)


def test_a_run_of_the_graph_repeats_without_it_on_both(server, tmp_path):
    """Its recipe.toml is all that the command line is given."""
    graph = prompts.training(name="seam", steps=24, rank=8, alpha=8.0, preview_prompts="")
    graph["dataset"]["inputs"] |= {"flip": True, "caption_dropout": 0.2}
    server.run(graph)
    runs = {"graph": server.base / "output" / "zturbo" / "seam"}
    for host in ("comfy", "diffusers"):
        command = [
            sys.executable,
            "-m",
            "zturbo",
            "train",
            str(runs["graph"] / "recipe.toml"),
            "--host",
            host,
            "--runs",
            str(tmp_path / host),
            "--json",
        ]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
        runs[host] = tmp_path / host / "seam"
    losses = {name: losses_of(run) for name, run in runs.items()}
    assert [len(found) for found in losses.values()] == [24, 24, 24]
    for host in ("comfy", "diffusers"):
        assert max(abs(a - b) / a for a, b in zip(losses["graph"][:20], losses[host])) < LOSSES
    pictures = [
        sampled(host, runs[name] / "lora.safetensors", tmp_path / f"{name}_{host}")
        for name in runs
        for host in ("comfy", "diffusers")
    ]
    for picture in pictures[1:]:
        apart = np.abs(picture - pictures[0])
        assert apart.max() <= PIXELS[0] and apart.mean() <= PIXELS[1]


@pytest.mark.parametrize("host", ["comfy", "diffusers"])
def test_a_lora_of_another_model_is_not_drawn_without(comfyui, tmp_path, capsys, host):
    place = "diffusion_model.layers.29.feed_forward.w1"
    save_file(
        {f"{place}.lora_A.weight": torch.zeros(2, 256), f"{place}.lora_B.weight": torch.zeros(768, 2)},
        tmp_path / "elsewhere.safetensors",
    )
    with torch.inference_mode(False):
        assert (
            cli.main(
                [
                    "sample",
                    "--model",
                    "tiny",
                    "--lora",
                    str(tmp_path / "elsewhere.safetensors"),
                    "--prompt",
                    "x",
                    "--size",
                    "64x64",
                    "--out",
                    str(tmp_path / "out"),
                    "--host",
                    host,
                ]
            )
            == 1
        )
    assert "does not fit this model" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


def test_the_demos_recipe_is_that_of_its_workflow(server):
    """models/tiny/demo.toml trains what workflows/tiny_demo.json trains."""
    prompt = dev.to_prompt(
        json.loads((dev.ROOT / "workflows" / "tiny_demo.json").read_text(encoding="utf-8")), server.get("/object_info")
    )
    (settings,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "ZTurboTrainLoRA")
    steps, settings["steps"], settings["name"] = settings["steps"], 1, "demo_recipe"
    server.run(prompt)
    there, here = (
        recipefile.read(server.base / "output" / "zturbo" / "demo_recipe" / "recipe.toml"),
        recipefile.read(dev.ROOT / "models" / "tiny" / "demo.toml"),
    )
    assert teaches(replace(there, steps=steps)) == teaches(here)
    assert (there.inputs.model, there.inputs.adapter, there.inputs.trigger, there.inputs.resolutions) == (
        here.inputs.model,
        here.inputs.adapter,
        here.inputs.trigger,
        here.inputs.resolutions,
    )
    assert Path(there.inputs.pictures) == dev.ROOT / here.inputs.pictures
