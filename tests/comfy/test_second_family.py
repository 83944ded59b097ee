"""A second model family, core's AuraFlow at a toy size, trains through the same trainer.

It has a description and a host of its own; nothing else is edited.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import comfy.ldm.aura.mmdit
import comfy.ops
import numpy as np
import pytest
import torch
from torch import nn

from zturbo import dataset, lorafile, lowrank, runlog, trainer
from zturbo.dataset import Encoded
from zturbo.family import Family
from zturbo.lowrank import Part, Target
from zturbo.recipe import Compute, Data, Network, Optimizer, Previews, Recipe, Saving, Turbo
from zturbo.roles import Unattended, counter, watched
from zturbo.runfolder import RunFolder

AURA = Family(
    name="AuraFlow",
    architecture="auraflow-v0.3/lora",
    base_version="auraflow",
    channels=4,
    shift=1.73,
    steps=4,
    trained=("double_layers.", "single_layers."),
    blocks=("double_layers.", "single_layers."),
    groups={"attention": "*.attn.*", "mlp": "*.mlp*"},
)
SIZES = {"dim": 32, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": 16, "cond_seq_dim": 12}


def aura() -> nn.Module:
    """The same random weights each time."""
    torch.manual_seed(0)
    operations = comfy.ops.disable_weight_init
    made = comfy.ldm.aura.mmdit.MMDiT(dtype=torch.float32, operations=operations, max_seq=64, **SIZES)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(1, parameter.shape[-1]) ** 0.5)
    return made.requires_grad_(False)


class AuraHost:
    """See `roles.Host`. Captions are random features of their texts; there is no adapter."""

    family, turbo = AURA, True

    def __init__(self, recipe: Recipe):
        self.recipe, self.device, self.dit = recipe, torch.device("cpu"), aura()
        self.linears = {
            name: module
            for name, module in self.dit.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(AURA.trained)
        }
        self.targets = [
            Target(name, one.in_features, one.out_features, (Part(name, 0, one.out_features),))
            for name, one in self.linears.items()
        ]

    def encode(self, given, captions, progress):
        from zturbo import turbo

        texts = (*captions.texts, *turbo.texts(self.recipe, given.trigger, self.turbo))
        told = counter(progress, len(texts) + len(given.items))
        self.features = []
        for text in texts:
            told()
            self.features.append(torch.randn(5, 12, generator=torch.Generator().manual_seed(len(text) + ord(text[0]))))
        latents = []
        for item in given.items:
            told()
            small = torch.from_numpy(item.pixels())[::8, ::8].movedim(-1, 0)
            latents.append(torch.cat((small, small.mean(0, keepdim=True)))[None] * 2 - 1)
        return Encoded(latents)

    def start(self):
        return None

    def norms(self, targets):
        return {target.module: self.linears[target.module].weight.norm(dim=0, keepdim=True) for target in targets}

    @contextmanager
    def training(self, lora):
        fetchers = {
            name: (one, lambda x, one=one: nullcontext((one.weight, one.bias))) for name, one in self.linears.items()
        }

        def velocity(x, sigma, numbers, factor=1.0):
            context = torch.stack([self.features[number] for number in numbers])
            return self.dit(x, sigma, context)

        with lowrank.attached(fetchers, self.targets, [lora]):
            yield velocity

    def out_of_memory(self, error):
        return False

    at_once, frugal = None, True

    def told(self):
        return []

    def save_memory(self):
        raise AssertionError("there is nothing to give up")

    def memory(self):
        return {}

    def draw(self, state, progress):
        lora = lorafile.from_state(state)
        pictures = []
        with torch.no_grad(), self.training(lora) as velocity:
            for number in watched(range(len(self.recipe.previews.prompts)), progress):
                x, grid = torch.ones(1, 4, 8, 8), AURA.sigmas()
                for high, low in zip(grid, grid[1:]):
                    x = x + velocity(x, high[None], (number,)) * (low - high)
                pictures.append((x[0, :3].movedim(0, -1).clamp(-1, 1).numpy() * 127 + 128).astype(np.uint8))
        return pictures


def pictures(recipe):
    made = [np.full((64, 64, 3), 40 * n, np.uint8) for n in range(4)]
    return dataset.from_arrays(made, ["zvk, one", "zvk, two", "zvk, three", "zvk, four"], (64,), "zvk", recipe.data)


RECIPE = Recipe(
    "aura",
    30,
    2,
    network=Network(4, 4, targets="attention:4, mlp:2"),
    optimizer=Optimizer(learning_rate=5e-3),
    compute=Compute("fp32", False, "branch"),
    data=Data(validation=0.25, validation_every=10),
    turbo=Turbo(every=10, size=64),
    saving=Saving(every=10, dtype="fp32"),
    previews=Previews(("a zvk",), 10),
)


def train(recipe, run, control=None):
    return trainer.train(recipe, pictures(recipe), AuraHost(recipe), run, control or Unattended(), {})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "guard"},
        {"keep": "restore", "restore_steps": 10},
        {"kind": "dora"},
    ],
    ids=["plain", "guard", "restore", "dora"],
)
def test_another_family_trains_watches_draws_saves_and_goes_on(tmp_path, changes):
    kind = {"network": replace(RECIPE.network, kind="dora")} if "kind" in changes else {}
    turbo = {key: value for key, value in changes.items() if key != "kind"}
    recipe = replace(RECIPE, turbo=replace(RECIPE.turbo, **turbo), **kind)
    run = RunFolder.new(tmp_path, recipe)
    result = train(recipe, run)
    assert result.steps == 30 and result.images[0].shape == (8, 8, 3)
    if "restore" not in changes.values():
        assert np.mean(result.losses[-10:]) < 0.98 * np.mean(result.losses[:10])
    events = runlog.read_events(run.events)
    assert len([one for one in events if one.get("event") == "health"]) == 3
    assert len([one for one in events if one.get("event") == "validation"]) == 4
    names = {key.removeprefix("diffusion_model.").split(".lora_")[0] for key in result.state if ".lora_" in key}
    assert "double_layers.0.attn.w1q" in names and "single_layers.1.mlp.c_fc1" in names
    assert not any("mod" in name for name in names)

    class Leaving(Unattended):
        def step(self, event):
            if event["step"] == 23:
                raise KeyboardInterrupt

    again = RunFolder.new(tmp_path, recipe)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, again, Leaving())
    resumed = train(recipe, RunFolder(again.path))
    assert resumed.losses == result.losses
    assert all(torch.equal(resumed.state[key], result.state[key]) for key in result.state)


def test_its_gauge_walks_its_own_grid(tmp_path):
    """Four steps at its own shift, in latents of its own channels."""
    from zturbo import health

    host = AuraHost(RECIPE)
    host.encode(pictures(RECIPE), pictures(RECIPE).captions(), lambda *_: None)
    with torch.no_grad(), host.training({}) as velocity:
        reference = health.walk(AURA, lambda x, sigma, numbers: velocity(x, sigma, numbers), (0, 1), (8, 8), 0, "cpu")
    even = torch.linspace(1, 0, 5)[:4]
    assert reference.states.shape == (2, 4, 4, 8, 8)
    assert torch.allclose(reference.sigmas[0], 1.73 * even / (1 + 0.73 * even))
