"""A whole training against another implementation: diffusers' Z-Image with PEFT and PyTorch's own AdamW.

Same weights (turbo with the adapter merged in), latents, captions, order, noise and timesteps; everything behind
that, model, LoRA, loss, clipping and optimizer, is theirs. Tolerance: 1e-5 of each of the first 20 losses, in
fp32: two orders of summation, each step building on the one before.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import diffusers_twin
from test_clean_weights import Control
from test_host import de_distilled, pictures

from zturbo import batches, flow, lowrank, network, trainer
from zturbo.hosts import comfy_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute, Network, Optimizer, Recipe, Timesteps
from zturbo.runfolder import RunFolder

STEPS = 20
TOLERANCE = 1e-5
TARGETS = r"layers\.\d+\..*(to_q|to_k|to_v|to_out\.0|w1|w2|w3|adaLN_modulation\.0)"


def peft_losses(
    twin, given: Recipe, made_of: batches.Pictures, captions: list[torch.Tensor], start: dict
) -> list[float]:
    from peft import LoraConfig

    twin.add_adapter(LoraConfig(r=given.network.rank, lora_alpha=given.network.alpha, target_modules=TARGETS))
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(start)
    with torch.no_grad():
        for name, parameter in trained.items():
            stem, letter = name.split(".lora_")
            parameter.copy_(getattr(start[stem], letter[0]))
    optimizer = torch.optim.AdamW(
        trained.values(), lr=given.optimizer.learning_rate, weight_decay=given.optimizer.weight_decay
    )
    losses = []
    for step in range(STEPS):
        batch, random = made_of.at(given.seed, step), flow.generator(given.seed, "step", step)
        sigma = torch.sigmoid(torch.randn(len(batch.captions), generator=random))
        eps = torch.randn(batch.x0.shape, generator=random)
        s = sigma.view(-1, 1, 1, 1)
        v = diffusers_twin.velocity(twin, (1 - s) * batch.x0 + s * eps, sigma, [captions[n] for n in batch.captions])
        loss = torch.nn.functional.mse_loss(v, eps - batch.x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), given.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", ["branch", "merged"])
def test_twenty_losses_are_those_of_diffusers_with_peft(tiny, tmp_path, way):
    model, clip, vae = tiny
    given = Recipe(
        steps=STEPS,
        batch_size=2,
        network=Network(4, 4),
        optimizer=Optimizer(learning_rate=2e-3, weight_decay=0.01),
        timesteps=Timesteps("sigmoid"),
        compute=Compute("fp32", False, way),
    )
    with torch.inference_mode(False), torch.enable_grad():
        host = ComfyHost(de_distilled(model), clip, vae, given)
        ours = trainer.train(given, pictures(), host, RunFolder.new(tmp_path, given), Control(), {}).losses
        merged = ComfyHost(de_distilled(model), clip, vae, Recipe(compute=Compute("fp32", False, "merged")))
        made_of = batches.pictures_of(given, pictures(), merged)
        with merged.training({}):
            twin = diffusers_twin.build(merged.dit, comfy_tiny.config()["unet_config"])
        theirs = peft_losses(
            twin,
            given,
            made_of,
            [features[0] for features in merged.features],
            network.create(host.targets, given.network, given.seed),
        )
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    assert lowrank.count(network.create(host.targets, given.network, 0)) == sum(
        p.numel() for p in twin.parameters() if p.requires_grad
    )
    assert theirs[-1] != pytest.approx(theirs[0], rel=TOLERANCE) and max(ours) - min(ours) > 0.01
