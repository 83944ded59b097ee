"""Stage 3: the turbo model. The teacher's guided many-step paths, regressed onto the 8-step grid.

At each of the eight sigmas the student learns the chord that leads to the next grid point of the
teacher's path (CFG 2, several Euler steps an interval), so eight steps at CFG 1 walk where many walked.
"""

import argparse
import time

import torch
from safetensors.torch import load_file, save_file

from . import world
from .setup import TINY, WORK, log, use_comfy
from .teacher import compile_blocks, make_optimizers


def teacher_paths(teacher, data, count: int, batch: int, seed: int, device, guidance: float = 2.0):
    """[(states [9, B, 16, H, W] half, caption rows [B])], one entry a batch of one shape."""
    generator, shapes, paths = torch.Generator().manual_seed(seed), list(data.latents), []
    for number in range(count // batch):
        height, width = shapes[number % len(shapes)]
        rows = torch.randint(len(data.features) - 1, (batch,), generator=generator)
        noise = torch.randn(batch, 16, height, width, generator=generator).to(device)
        with torch.no_grad():
            caption = world.refine(teacher, data.features[rows].to(device), data.lengths[rows])
            empty = world.refine(teacher, data.features[[-1] * batch].to(device), data.lengths[[-1] * batch])
        states = []
        world.sample(teacher, noise, caption, empty, scale=guidance, substeps=3, path=states)
        paths.append((torch.stack(states).half().cpu(), rows))
        if number % 10 == 9:
            log.info("teacher paths %d of %d", (number + 1) * batch, count)
    return paths


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab distill")
    parser.add_argument("--paths", type=int, default=1920)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--compile", action="store_true", help="through torch.compile, as in the teacher")
    args = parser.parse_args(argv)
    device = use_comfy()
    import comfy.model_management

    from zturbo.hosts import comfy_tiny
    from zturbo.hosts.comfy_forward import velocity

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    comfy.model_management.in_training = True
    data = world.build(args.pictures, 1, device)
    teacher = comfy_tiny.build(torch.float32, device).diffusion_model
    teacher.load_state_dict(load_file(WORK / "teacher.safetensors"))
    if args.compile:
        compile_blocks(teacher)
    paths = teacher_paths(teacher, data, args.paths, 32, args.seed, device)
    student = teacher.requires_grad_(True)
    grid = torch.tensor(world.SIGMAS)
    parameters = list(student.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(student, args.lr)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05) for optimizer in optimizers
    ]
    started, recent = time.time(), []
    for step in range(args.steps):
        states, rows = paths[torch.randint(len(paths), (1,), generator=generator).item()]
        i = torch.randint(8, (args.batch,), generator=generator)
        pick = torch.randint(len(rows), (args.batch,), generator=generator)
        here, there = states[i, pick].float().to(device), states[i + 1, pick].float().to(device)
        sigma, width = grid[i].to(device), (grid[i + 1] - grid[i])[:, None, None, None].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            caption = world.refine(student, data.features[rows[pick]].to(device), data.lengths[rows[pick]])
            v = velocity(student, here, sigma, caption, grad_before_layers=True)
        loss = (v.float() - (there - here) / width).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        student.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.995, (1 + step) / (10 + step)))
        recent.append(loss.item())
        if step % 50 == 49:
            log.info(
                "distill step %d loss %.4f, %.2f s/step",
                step + 1,
                sum(recent) / len(recent),
                (time.time() - started) / (step + 1),
            )
            recent = []
        if step % 500 == 499 or step + 1 == args.steps:
            keep(student, average, data, device, step + 1)


def keep(student, average, data, device, step: int):
    """Export the averaged weights in bf16 and draw a contact sheet at 8 steps, CFG 1, with the exported ones."""
    from zturbo.hosts import comfy_tiny

    state = {name: value.bfloat16().cpu().contiguous() for (name, _), value in zip(student.named_parameters(), average)}
    save_file(state, TINY / "z_image_turbo_tiny.safetensors", metadata={"format": "pt"})
    turbo = comfy_tiny.build(torch.float32, device).diffusion_model
    turbo.load_state_dict({name: value.float() for name, value in state.items()})
    rows = torch.arange(0, len(data.features) - 1, (len(data.features) - 1) // 24)[:24]
    with torch.no_grad():
        caption = world.refine(turbo, data.features[rows].to(device), data.lengths[rows])
    noise = torch.randn(24, 16, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    world.contact_sheet(
        world.sample(turbo, noise, caption), world.load_autoencoder(device), WORK / f"turbo_{step:05d}.png"
    )
