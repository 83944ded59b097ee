"""LoRA, DoRA, LoKr and LoHa as this pack trains and writes them.

What trains, what core's loader applies, and the equation are one.
"""

import comfy.lora
import pytest
import torch

from zturbo import dataset, lorafile, network
from zturbo.hosts import comfy_adapter, comfy_draw, comfy_paths
from zturbo.hosts.comfy import ComfyHost
from zturbo.lowrank import Factors
from zturbo.recipe import Compute, Network, Recipe

CLOSE = 2e-6  # relative L2 of weights, fp32
VELOCITY = 1e-4  # relative L2 in fp32: two orders of summation, four blocks deep
NETWORKS = {
    "lora": Network(4, 2, "lora"),
    "lora of several ranks": Network(4, 2, "lora", targets="attention:8, feed_forward:2, *.to_q:3"),
    "dora": Network(4, 2, "dora"),
    "lokr": Network(4, 2, "lokr", factor=8),
    "lokr whole": Network(4, 1000, "lokr", factor=64),
    "loha": Network(3, 2, "loha"),
}


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def scene(tiny):
    with torch.inference_mode(False):
        host = ComfyHost(*tiny, Recipe(network=Network(4, 4), compute=Compute("fp32", False)))
        pictures = dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (128,), "zsmile")
        host.encode(pictures, pictures.captions())
    return host, tiny


def trained(host, net):
    """As if some steps had moved every number."""
    lora = network.create(host.targets, net, 0, norms=host.norms)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in lora.values():
            for kind, tensor in one.tensors.items():
                step = torch.randn(tensor.shape, generator=random)
                tensor.mul_(1 + 0.1 * step) if kind == "dora_scale" else tensor.add_(0.05 * step)
    return lora


def by_equation(one, weight):
    """W' of a part: W + D, or DoRA's m (W + D) / |W + D| column by column (arXiv 2402.09353, eq. 5)."""
    changed = weight + one.delta()
    magnitude = one.magnitude if isinstance(one, Factors) else None
    return changed if magnitude is None else magnitude * changed / changed.norm(dim=0, keepdim=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_core_applies_what_was_trained(kind, scene, caplog):
    host, tiny = scene
    x, sigma = torch.randn(2, 16, 18, 14, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    with torch.inference_mode(False), torch.no_grad():
        lora = trained(host, NETWORKS[kind])
        state = lorafile.state_dict(lora, torch.float32)
        patched = comfy_draw.with_lora(tiny[0], state)
        assert "not loaded" not in caplog.text.lower()
        assert sum(len(entries) for entries in patched.patches.values()) == len(lora)
        for target in (target for target in host.targets if any(part.name in lora for part in target.parts)):
            key = f"diffusion_model.{target.module}.weight"
            clean = comfy_adapter.linears(host.dit)[target.module].weight.float()
            changed = comfy.lora.calculate_weight(patched.patches[key], clean.clone(), key)
            for part in target.parts:
                assert relative(changed[part.rows], by_equation(lora[part.name], clean[part.rows])) < CLOSE, part.name
        with host.training({}) as velocity:
            clean = velocity(x, sigma, (0, 1))
        with host.training(lora) as velocity:
            by_branch = velocity(x, sigma, (0, 1))
        merged = ComfyHost(patched, *tiny[1:], host.recipe)
        merged.features = host.features
        with merged.training({}) as velocity:
            by_core = velocity(x, sigma, (0, 1))
        again = lorafile.parse(state)[0]
        with host.training(again) as velocity:
            by_file = velocity(x, sigma, (0, 1))
    assert relative(by_core, clean) > 0.005  # it does something
    assert relative(by_branch, by_core) < VELOCITY and relative(by_file, by_core) < VELOCITY
    assert "error" not in caplog.text.lower()
    assert all(
        torch.equal(again[name].tensors[key], tensor)
        for name, one in lora.items()
        for key, tensor in one.tensors.items()
    )


@pytest.mark.parametrize("kind", NETWORKS)
def test_in_bf16_dora_keeps_its_lengths(kind, scene):
    """A length rounded to bf16 moves its whole column by up to 0.4 %, more than most LoRAs do."""
    host, _ = scene
    with torch.inference_mode(False), torch.no_grad():
        lora = trained(host, NETWORKS[kind])
        dtypes = {
            key.rsplit(".", 1)[1]: tensor.dtype for key, tensor in lorafile.state_dict(lora, torch.bfloat16).items()
        }
    assert (
        dtypes.pop("dora_scale", torch.float32) == torch.float32 and dtypes.pop("alpha", torch.float32) == torch.float32
    )
    assert set(dtypes.values()) == {torch.bfloat16}
