"""The same recipe on both hosts: ComfyUI's code and diffusers', from the same files."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_host import de_distilled

from zturbo import dataset, lorafile, network, trainer
from zturbo.errors import LoraFileError, ModelError
from zturbo.hosts import comfy_draw, comfy_forward, comfy_tiny, diffusers_load, diffusers_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.hosts.diffusers import DiffusersHost
from zturbo.recipe import AdapterCourse, Compute, Data, Network, Optimizer, Previews, Recipe, Turbo
from zturbo.runfolder import RunFolder

TEXTS = ("a large zsmile on a blue background", "Ein schönes Bild, 日本 🎨!", "", "x  y\n\n12345")
UNRELATED = tuple(f"a large {color} star on a {ground} background" for color in ("red", "blue", "green") for ground in ("white", "pink", "gray", "black"))
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
        alone = [comfy_forward.velocity(dit, x[n : n + 1], sigma[n : n + 1], comfy_forward.refine_caption(dit, host.features[n])) for n in range(2)]
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
        return trainer.train(given, dataset.from_folder(comfy_tiny.PICTURES, (128,), "zsmile", given.data), host, run, trainer.Unattended(), {}), run


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
    assert max(relative(here.state[key].float(), value.float()) for key, value in there.state.items() if value.any()) < NUMBERS
    apart = np.abs(there.images[0].astype(int) - here.images[0].astype(int))
    assert apart.max() <= PIXELS[0] and apart.mean() <= PIXELS[1]
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.transformer.parameters()))  # clean weights stay clean


def test_one_lora_file_draws_the_same_on_both(loaded, tiny):
    given = recipe()
    lora = network.create(headless(loaded, given).targets, given.network, 0)
    for name, part in lora.items():
        part.B.data = 0.3 * torch.randn(part.B.shape, generator=torch.Generator().manual_seed(len(name)))
    state, pictures = lorafile.state_dict(lora, torch.float32), dataset.from_arrays([np.zeros((64, 64, 3), np.uint8)], ["a"], (64,))
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


class Cancelled(trainer.Unattended):
    steps = 0

    def check(self):
        if self.steps >= 9:
            raise KeyboardInterrupt

    def step(self, event):
        self.steps += 1


def test_a_headless_run_that_was_cut_off_goes_on_to_the_same_bits(loaded, tmp_path):
    given = recipe(turbo=Turbo("restore", every=10, prompts=UNRELATED, restore_steps=12))
    whole, _ = trained(headless(loaded, given), given, tmp_path)
    run, pictures = RunFolder.new(tmp_path, given), dataset.from_folder(comfy_tiny.PICTURES, (128,), "zsmile", given.data)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, pictures, headless(loaded, given), run, Cancelled(), {})
    again = trainer.train(given, pictures, headless(loaded, given), RunFolder(run.path), trainer.Unattended(), {})
    assert again.losses == whole.losses and all(torch.equal(again.state[key], whole.state[key]) for key in whole.state)


def test_what_is_no_zimage_gets_a_sentence(loaded, tmp_path):
    with pytest.raises(ModelError, match="not Z-Image"):
        diffusers_load.load_transformer(diffusers_tiny.VAE, torch.float32)
    with pytest.raises(ModelError, match="no text encoder"):
        diffusers_load.load_text_encoder(diffusers_tiny.VAE, torch.float32)
    with pytest.raises(ModelError, match="no VAE"):
        diffusers_load.load_autoencoder(diffusers_tiny.MODEL, torch.float32)
    with pytest.raises(ModelError, match="tokenizer"):
        diffusers_load.load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="config.json"):
        diffusers_load.load_transformer(tmp_path, torch.float32)
    with pytest.raises(ModelError, match="whole file"):
        diffusers_load.load_transformer(tmp_path / "none.safetensors", torch.float32)
    with pytest.raises(LoraFileError):
        DiffusersHost(loaded, recipe(), torch.device("cpu"), lorafile.of_state({"diffusion_model.layers.77.attention.to_q.lora_A.weight": torch.zeros(2, 256), "diffusion_model.layers.77.attention.to_q.lora_B.weight": torch.zeros(256, 2)}, "x"), 1.0, "x")  # fmt: skip


def test_a_diffusers_folder_loads_like_the_single_file(loaded, tmp_path):
    """What diffusers saves of the tiny transformer and autoencoder is what a folder gives back."""
    loaded.autoencoder.module.save_pretrained(tmp_path / "vae")
    with pytest.raises(ModelError, match="AutoencoderKL"):
        diffusers_load.load_autoencoder(tmp_path / "vae", torch.float32)
    loaded.text_encoder.module.save_pretrained(tmp_path / "text_encoder")
    loaded.text_encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = diffusers_load.TextEncoder(diffusers_load.load_text_encoder(tmp_path / "text_encoder", torch.float32), diffusers_load.load_tokenizer(tmp_path / "text_encoder"))
    for text in TEXTS:
        assert torch.equal(again.encode(text), loaded.text_encoder.encode(text))
