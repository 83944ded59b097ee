"""Stage 3, second half: turbo's distribution is matched to the guided teacher's.

Distribution matching distillation (DMD, arXiv 2311.18828; on the student's own paths, arXiv 2405.14867): from
a state of its own 8-step path the student's x0 is noised again; the guided teacher says where pictures are denser there
than the student draws them, a third network that learns the student's own distribution says where it is now, and the
student goes the difference. The chord regression of `lab distill` stays as an anchor.
"""

import argparse
import copy
import time

import torch
from safetensors.torch import load_file

from . import world
from .distill import keep, teacher_paths
from .setup import WORK, log, use_comfy
from .teacher import compile_blocks, flow_matching_loss


def own_path(student, noise, caption, steps: int):
    """The state after `steps` of the eight steps, without gradient."""
    x = noise
    with torch.no_grad():
        for high, low in zip(world.SIGMAS[:steps], world.SIGMAS[1 : steps + 1]):
            x = x + world.guided(student, x, high, caption, None, 1.0) * (low - high)
    return x


def direction(teacher, fake, x0, rows, data, empty, scale: float, generator, device):
    """Where x0 should go: guided teacher's x0 minus the student distribution's own, after noising; per picture of unit size."""
    from zturbo.hosts.comfy_forward import velocity

    sigma = (0.02 + 0.96 * torch.rand(len(x0), generator=generator)).to(device)
    s = sigma[:, None, None, None]
    x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=generator).to(device)
    features, lengths = data.features[rows].to(device), data.lengths[rows]
    with torch.no_grad():
        real = velocity(teacher, torch.cat((x, x)), torch.cat((sigma, sigma)), torch.cat((world.refine(teacher, features, lengths), empty))).float()
        with_caption, without = real.chunk(2)
        real = x - s * (without + scale * (with_caption - without))
        own = x - s * velocity(fake, x, sigma, world.refine(fake, features, lengths)).float()
        return (real - own) / (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(0.02)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab match")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--anchor", type=float, default=0.5, help="weight of the chord regression")
    parser.add_argument("--paths", type=int, default=960)
    parser.add_argument("--seed", type=int, default=6)
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
    teacher = comfy_tiny.build(torch.float32, device).diffusion_model.requires_grad_(False)
    teacher.load_state_dict(load_file(WORK / "teacher.safetensors"))
    student = world.load_turbo(device).requires_grad_(True)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    if args.compile:
        for one in (teacher, student, fake):
            compile_blocks(one)
    paths = teacher_paths(teacher, data, args.paths, 32, args.seed, device, args.guidance)
    grid = torch.tensor(world.SIGMAS)
    parameters = list(student.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.0, 0.99), weight_decay=0)
    follows = torch.optim.AdamW(fake.parameters(), lr=2 * args.lr, betas=(0.0, 0.99), weight_decay=0)
    with torch.no_grad():
        empty = world.refine(teacher, data.features[[-1] * args.batch].to(device), data.lengths[[-1] * args.batch])
    started, recent = time.time(), []
    for step in range(args.steps):
        height, width = list(data.latents)[int(torch.randint(len(data.latents), (), generator=generator))]
        rows = torch.randint(len(data.features) - 1, (args.batch,), generator=generator)
        noise = torch.randn(args.batch, 16, height, width, generator=generator).to(device)
        features, lengths = data.features[rows].to(device), data.lengths[rows]
        i = int(torch.randint(8, (), generator=generator))
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                caption = world.refine(student, features, lengths)
            x = own_path(student, noise, caption, i)
            caption = world.refine(student, features, lengths)
            sigma = torch.full((args.batch,), world.SIGMAS[i], device=device)
            x0 = x - world.SIGMAS[i] * velocity(student, x, sigma, caption, grad_before_layers=True).float()
            follow = flow_matching_loss(fake, x0.detach(), world.refine(fake, features, lengths), generator)
            follow.backward()
            torch.nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
            follows.step()
            follows.zero_grad(set_to_none=True)
            if step < 100:  # first the third network learns how the student draws
                continue
            goal = x0.detach() + direction(teacher, fake, x0.detach(), rows, data, empty, args.guidance, generator, device)
            match = (x0 - goal).square().mean()
            states, asked = paths[int(torch.randint(len(paths), (), generator=generator))]
            j, pick = torch.randint(8, (args.batch,), generator=generator), torch.randint(len(asked), (args.batch,), generator=generator)
            here, there = states[j, pick].float().to(device), states[j + 1, pick].float().to(device)
            caption = world.refine(student, data.features[asked[pick]].to(device), data.lengths[asked[pick]])
            chord = (there - here) / (grid[j + 1] - grid[j])[:, None, None, None].to(device)
            anchor = (velocity(student, here, grid[j].to(device), caption, grad_before_layers=True).float() - chord).square().mean()
            (match + args.anchor * anchor).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        student.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.995, (1 + step) / (10 + step)))
        recent.append((match.item(), anchor.item(), follow.item()))
        if step % 50 == 49:
            means = [sum(column) / len(recent) for column in zip(*recent)]
            log.info("match step %d, match %.4f anchor %.4f follow %.4f, %.2f s/step", step + 1, *means, (time.time() - started) / (step + 1))
            recent = []
        if step % 500 == 499 or step + 1 == args.steps:
            keep(student, average, data, device, step + 1)
