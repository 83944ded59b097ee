"""Stage 4: the de-distill adapter, made as the real one was.

Turbo draws pictures at several sizes; a LoRA trains on them with plain flow matching at a low rate, so that
the distillation lets go slowly while the knowledge stays.
"""

import argparse
import time

import torch
from safetensors.torch import save_file

from . import world
from .setup import TINY, WORK, log, use_comfy
from .teacher import random_sigma


def turbo_pictures(turbo, data, count: int, batch: int, seed: int, device):
    """[(latents [B, 16, H, W], caption rows [B])] drawn by turbo at 8 steps, one entry a batch of one shape."""
    generator, shapes, drawn = torch.Generator().manual_seed(seed), list(data.latents), []
    for number in range(count // batch):
        height, width = shapes[number % len(shapes)]
        rows = torch.randint(len(data.features) - 1, (batch,), generator=generator)
        noise = torch.randn(batch, 16, height, width, generator=generator).to(device)
        with torch.no_grad():
            caption = world.refine(turbo, data.features[rows].to(device), data.lengths[rows])
        drawn.append((world.sample(turbo, noise, caption).cpu(), rows))
    log.info("turbo drew %d pictures", count)
    return drawn


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab adapter")
    parser.add_argument("--pictures", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--world", type=int, default=24000)
    args = parser.parse_args(argv)
    device = use_comfy()
    import comfy.model_management

    from zturbo import lorafile, lowrank, network
    from zturbo.hosts import comfy_adapter
    from zturbo.hosts.comfy_forward import velocity
    from zturbo.hosts.comfy_lend import fetchers
    from zturbo.recipe import Network

    generator = torch.Generator().manual_seed(args.seed)
    comfy.model_management.in_training = True
    data = world.build(args.world, 1, device)
    turbo = world.load_turbo(device)
    drawn = turbo_pictures(turbo, data, args.pictures, 64, args.seed, device)
    targets = comfy_adapter.targets(turbo, ("layers.",))
    lora = network.create(targets, Network(args.rank, args.rank), args.seed, device)
    linears = fetchers(turbo)
    optimizer = torch.optim.AdamW(lowrank.parameters(lora), lr=args.lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, 50)
    started, recent = time.time(), []
    for step in range(args.steps):
        latents, rows = drawn[torch.randint(len(drawn), (1,), generator=generator).item()]
        pick = torch.randperm(len(rows), generator=generator)[: args.batch]
        x0, sigma = latents[pick].to(device), random_sigma(args.batch, generator).to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        s = sigma[:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16), lowrank.attached(linears, targets, [lora]):
            with torch.no_grad():
                caption = world.refine(turbo, data.features[rows[pick]].to(device), data.lengths[rows[pick]])
            v = velocity(turbo, (1 - s) * x0 + s * eps, sigma, caption)
            loss = (v.float() - (eps - x0)).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        recent.append(loss.item())
        if step % 50 == 49:
            log.info(
                "adapter step %d loss %.4f, %.2f s/step",
                step + 1,
                sum(recent) / len(recent),
                (time.time() - started) / (step + 1),
            )
            recent = []
        if step % 250 == 249 or step + 1 == args.steps:
            save_file(
                lorafile.state_dict(lora, torch.bfloat16),
                TINY / "z_image_turbo_tiny_adapter.safetensors",
                metadata={"format": "pt"},
            )
    keep(turbo, linears, targets, lora, data, device)


def keep(turbo, linears, targets, lora, data, device):
    """Contact sheets of the de-distilled model: 8 steps at CFG 1 (blurred), 24 steps at CFG 2 (whole)."""
    from zturbo import lowrank

    taesd = world.load_autoencoder(device)
    rows = torch.arange(0, len(data.features) - 1, (len(data.features) - 1) // 24)[:24]
    noise = torch.randn(24, 16, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), lowrank.attached(linears, targets, [lora]):
        caption = world.refine(turbo, data.features[rows].to(device), data.lengths[rows])
        empty = world.refine(turbo, data.features[[-1] * 24].to(device), data.lengths[[-1] * 24])
        world.contact_sheet(world.sample(turbo, noise, caption), taesd, WORK / "dedistilled_8.png")
        world.contact_sheet(
            world.sample(turbo, noise, caption, empty, scale=2.0, substeps=3), taesd, WORK / "dedistilled_24_cfg2.png"
        )
