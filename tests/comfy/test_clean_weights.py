"""Law 1: whatever happens, the user's MODEL has the same bytes afterwards (sha256 over all weights)."""

import sys
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_host import de_distilled, fingerprint, pictures

from zturbo import lorafile, roles, trainer
from zturbo.hosts import comfy_adapter, comfy_blocks, comfy_draw, comfy_forward
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute, Network, Previews, Recipe
from zturbo.runfolder import RunFolder
from zturbo.stack import Stack


class Boom(BaseException):
    """Stands for Cancel, Ctrl-C and everything else that can come at any moment."""


class Control(roles.Unattended):
    def __init__(self, cancel_at=None):
        self.steps, self.cancel_at = 0, cancel_at

    def check(self):
        if self.cancel_at is not None and self.steps + 1 >= self.cancel_at:
            raise comfy.model_management.InterruptProcessingException

    def step(self, event):
        self.steps = event["step"]


def recipe(way):
    return Recipe(
        steps=4,
        batch_size=2,
        network=Network(4, 4),
        compute=Compute("fp32", True, way),
        previews=Previews(("a large zsmile on a blue background",), 2, 64, 64, seed=1),
    )


def train(tiny, way, folder, control=None):
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.enable_grad():
        given = recipe(way)
        host = ComfyHost(de_distilled(model), clip, vae, given)
        return trainer.train(given, pictures(), host, RunFolder.new(folder, given), control or Control(), {})


# (module or class, function): everything that a run goes through, in order
STAGES = [
    (comfy.sd.VAE, "encode"),
    (comfy_draw, "encode_prompt"),
    (comfy.model_management, "load_models_gpu"),
    (comfy_forward, "refine_caption"),
    (comfy_blocks.Fast, "velocity"),
    (Stack, "forward"),
    (Stack, "learn"),
    (Stack, "through"),
    (torch.Tensor, "backward"),
    (torch.optim.AdamW, "step"),
    (comfy.sd, "load_lora_for_models"),
    (comfy.sample, "sample"),
    (comfy.sd.VAE, "decode"),
    (lorafile, "state_dict"),
    (lorafile, "write"),
]


@pytest.mark.parametrize("way", ["branch", "merged"])
def test_after_a_whole_run(tiny, way, tmp_path):
    before = fingerprint(tiny[0])
    result = train(tiny, way, tmp_path)
    assert fingerprint(tiny[0]) == before and result.steps == 4 and len(result.images) == 1
    assert any(value.abs().max() > 0 for key, value in result.state.items() if "lora_B" in key)


@pytest.mark.parametrize(
    "place, name", STAGES, ids=[f"{place.__name__.split('.')[-1]}.{name}" for place, name in STAGES]
)
def test_after_an_error_in_any_stage(tiny, place, name, tmp_path, monkeypatch):
    before = fingerprint(tiny[0])
    thrown = []

    def explode(*args, **kwargs):
        thrown.append(name)
        raise Boom(name)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, explode)
        with pytest.raises(Boom):
            train(tiny, "merged", tmp_path)
    assert thrown and fingerprint(tiny[0]) == before
    assert comfy.model_management.in_training is False
    assert not any("forward" in module.__dict__ for module in tiny[0].model.diffusion_model.modules())
    assert tiny[0].patches == {} and comfy_adapter.carried(tiny[0]) is None


@pytest.mark.parametrize("at", [1, 2, 3, 4])  # 1: while pictures are encoded
def test_after_cancel_at_every_step(tiny, at, tmp_path):
    before = fingerprint(tiny[0])
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(tiny, "merged", tmp_path, Control(at))
    assert fingerprint(tiny[0]) == before
    assert len(list(tmp_path.glob("*/lora.safetensors"))) == (0 if at == 1 else 1)


def test_the_two_ways_learn_the_same_lora_within_rounding(tiny, tmp_path):
    """Four steps of AdamW in fp32; 5 % of the difference's norm, because Adam turns tiny gradients into whole steps."""
    states = [train(tiny, way, tmp_path).state for way in ("branch", "merged")]
    deltas = [{name: f.delta() for name, f in lorafile.parse(state)[0].items()} for state in states]
    for name in deltas[0]:
        assert (deltas[0][name] - deltas[1][name]).norm() < 0.05 * deltas[1][name].norm()
