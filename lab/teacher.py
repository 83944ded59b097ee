"""Stage 2: the teacher, an undistilled Z-Image at the tiny size, by plain flow matching with caption dropout."""

import argparse
import time

import torch
from safetensors.torch import load_file, save_file

from . import world
from .setup import WEIGHTS, WORK, log, use_comfy


def initialise(dit):
    """Comfy's layers skip initialisation.

    Modulations start at zero with open gates, the output at zero (DiT, arXiv 2212.09748).
    """
    torch.nn.init.normal_(dit.x_pad_token, std=0.02)
    torch.nn.init.normal_(dit.cap_pad_token, std=0.02)
    for name, module in dit.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if "adaLN" in name or name == "final_layer.linear":
                torch.nn.init.zeros_(module.weight)
                if "layers" in name or "noise_refiner" in name:
                    _, gate_attention, _, gate_mlp = module.bias.data.chunk(4)
                    gate_attention.fill_(0.5)
                    gate_mlp.fill_(0.5)
        elif isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.ones_(module.weight)


def make_optimizers(dit, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (AdamW's learning rates fit), AdamW for everything else."""
    blocks = {id(p) for name, p in dit.named_parameters() if p.ndim == 2 and ("layers." in name or "refiner." in name)}
    matrices = [p for p in dit.parameters() if id(p) in blocks]
    rest = [p for p in dit.parameters() if id(p) not in blocks]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0)]


def random_sigma(count: int, generator: torch.Generator) -> torch.Tensor:
    """Half logit-normal, half uniform through shift 2: busy in the middle, no gap at the ends."""
    normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.3)
    uniform = torch.rand(count, generator=generator)
    shifted = 2 * uniform / (1 + uniform)
    return torch.where(torch.rand(count, generator=generator) < 0.5, normal, shifted)


def flow_matching_loss(dit, x0, caption, generator) -> torch.Tensor:
    from zturbo.hosts.comfy_forward import velocity

    sigma = random_sigma(len(x0), generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    s = sigma[:, None, None, None]
    v = velocity(dit, (1 - s) * x0 + s * eps, sigma, caption, grad_before_layers=True)
    return (v.float() - (eps - x0)).square().mean()


def compile_blocks(dit):
    """Compile each transformer block, with attention written out.

    At a hundred tokens that beats the fused kernel on a CPU.
    """
    from zturbo.hosts import comfy_forward

    def plain_attention(_chosen, q, k, v, heads, *args, **kwargs):
        out = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
        return out.transpose(1, 2).flatten(2)

    comfy_forward.OPTIONS["optimized_attention_override"] = plain_attention
    torch._dynamo.config.recompile_limit = 64
    for block in (*dit.layers, *dit.noise_refiner, *dit.context_refiner):
        block.forward = torch.compile(block.forward, dynamic=False)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab teacher")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="through torch.compile: about twice as fast on a CPU, needs a C++ compiler",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from lab/work/teacher.safetensors, with a learning rate schedule of its own",
    )
    args = parser.parse_args(argv)
    device = use_comfy()
    import comfy.model_management

    from zturbo.hosts import comfy_tiny

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data = world.build(args.pictures, 1, device)
    dit = comfy_tiny.build(torch.float32, device).diffusion_model.requires_grad_(True)
    initialise(dit)
    if args.resume:
        dit.load_state_dict(load_file(WORK / "teacher.safetensors"))
    comfy.model_management.in_training = True
    if args.compile:
        compile_blocks(dit)
    parameters = list(dit.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(dit, args.lr)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05) for optimizer in optimizers
    ]
    started, recent = time.time(), []
    for step in range(args.steps):
        x0, rows = data.batch(args.batch, generator, drop=0.1)
        with torch.autocast(device.type, torch.bfloat16):
            caption = world.refine(dit, data.features[rows].to(device), data.lengths[rows])
            loss = flow_matching_loss(dit, x0.to(device), caption, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        dit.zero_grad(set_to_none=True)
        rate = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - rate)
        recent.append(loss.item())
        if step % 50 == 49:
            log.info(
                "teacher step %d loss %.4f, %.2f s/step",
                step + 1,
                sum(recent) / len(recent),
                (time.time() - started) / (step + 1),
            )
            recent = []
        if step % 500 == 499 or step + 1 == args.steps:
            keep(dit, average, data, device, step + 1)


def keep(dit, average, data, device, step: int):
    """Save the averaged weights and a contact sheet drawn with 24 steps at CFG 2."""
    names = [name for name, _ in dit.named_parameters()]
    state = {name: value.cpu().contiguous() for name, value in zip(names, average)}
    save_file(state, WORK / "teacher.safetensors")
    save_file({name: value.bfloat16() for name, value in state.items()}, WEIGHTS / "teacher.safetensors")
    live = [p.detach().clone() for p in dit.parameters()]
    with torch.no_grad():
        for p, value in zip(dit.parameters(), average):
            p.copy_(value)
        rows = torch.arange(0, len(data.features) - 1, (len(data.features) - 1) // 24)[:24]
        caption = world.refine(dit, data.features[rows].to(device), data.lengths[rows])
        empty = world.refine(dit, data.features[[-1] * 24].to(device), data.lengths[[-1] * 24])
        noise = torch.randn(24, 16, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
        latents = world.sample(dit, noise, caption, empty, scale=2.0, substeps=3)
        world.contact_sheet(latents, world.load_autoencoder(device), WORK / f"teacher_{step:05d}.png")
        for p, value in zip(dit.parameters(), live):
            p.copy_(value)
