"""One optimizer step on one processor core, on the same work: this pack, core's TrainLoraNode, diffusers with PEFT.

The work and the contenders stand in bench/peers.py. They take turns (A B C A B C …), some steps of each; ratios are
those within a round, and printed are medians over the rounds with minimum and maximum. Above 1 the pack is faster.
With them goes the floor, which is the frozen model's matrix products and attention alone, and on the same picture,
noise, noise level, caption and LoRA the losses, which must agree.
"""

import argparse
import json
import statistics
import sys
from unittest import mock

import torch

from bench import peers
from bench.peers import CONTENDERS, Core, Loop, Peft, Work

ALIKE = {"fp32": 1e-4, "bf16": 3e-2}  # relative difference of losses


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench step")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), help="these, and what they are compared with")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    peers.one_core()
    place, work = peers.machine(), Work(args.dtype)
    print(", ".join(f"{name} {value}" for name, value in {**place, "dtype": args.dtype}.items()), flush=True)
    names = [name for name in CONTENDERS if not args.only or name in args.only or name in ("ours", "loop")]
    opened = {name: CONTENDERS[name](work) for name in names}
    losses = compare_losses(work)
    for pair, difference in losses.items():
        print(f"losses, {pair}: {difference:.1e} relative (at most {ALIKE[args.dtype]:g})", flush=True)
    times = race(opened, args.rounds)
    for name, rounds in times.items():
        print(f"{name:18} {said(rounds, 's')}")
    ratios = ratios_of(times)
    for name, values in ratios.items():
        print(f"{name:40} {said(values)}")
    if args.json:
        facts = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
        seconds = {name: round(statistics.median(rounds), 4) for name, rounds in times.items()}
        print(json.dumps({**facts, "losses": losses, "seconds": seconds, "rounds": args.rounds, **place}))


def said(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):7.3f} {unit} (min {min(values):.3f}, max {max(values):.3f})"


# Speed


def race(opened: dict[str, peers.Turn], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of a step, the mean of a turn, by contender and round; and what our log says on the wall."""
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, turn in opened.items():
            times.setdefault(name, []).append(statistics.mean(turn()))
            if name == "ours":
                times.setdefault("log, on the wall", []).append(statistics.mean(turn.logged))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


# name of a ratio: whose time over whose
RATIOS = {
    **{name: (name, "ours") for name in ("core_default", "core_best", "peft", "peft_checkpointed")},
    "floor": ("ours", "floor"),
    "batch4_over_batch1": ("batch4", "loop"),
    "node_over_loop": ("ours", "loop"),
    "branch_over_ours": ("branch", "loop"),
    "checkpointed_over_ours": ("ours_checkpointed", "loop"),
    "peft_checkpointed_over_ours_checkpointed": ("peft_checkpointed", "ours_checkpointed"),
}


def ratios_of(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Round by round, of those that took part."""
    pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= times.keys()}
    return {name: [a / b for a, b in zip(times[one], times[other])] for name, (one, other) in pairs.items()}


# Losses


def compare_losses(work: Work) -> dict[str, float]:
    """Relative difference of our loss from a peer's, at the same picture, noise, noise level, caption and LoRA.

    With PEFT at a LoRA that has been filled by chance; with core, whose LoRAs have another form, at an untrained one.
    Raises AssertionError where they are further apart than ALIKE.
    """
    ours, peft = Loop(work), Peft(work)
    assert ours.trained == peft.trained, (ours.trained, peft.trained)
    x0, eps, sigma = work.latents(5), work.latents(6), torch.tensor([0.6])
    untrained = our_loss(ours, x0, eps, sigma)
    found = {"core": apart(untrained, core_loss(work, x0, eps, sigma))}
    fill(ours, peft)
    with torch.no_grad():
        found["peft"] = apart(our_loss(ours, x0, eps, sigma), peft.loss(x0, eps, sigma).item())
    assert max(found.values()) <= ALIKE[work.dtype], found
    return found


def apart(one: float, other: float) -> float:
    return float(f"{abs(one - other) / other:.2e}")


def our_loss(ours: Loop, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> float:
    from zturbo import flow

    with torch.no_grad(), ours.host.training(ours.state.lora) as velocity:
        v = velocity(flow.add_noise(x0, eps, sigma), sigma, (0,), 1.0)
        return flow.velocity_loss(v, flow.velocity_target(x0, eps), torch.ones(1)).item()


def core_loss(work: Work, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> float:
    """Of the first step of core's trainer, whose square error is the picture's: sigma squared times the velocity's."""
    from comfy_extras import nodes_train

    noise = type("Noise", (), {"seed": 0, "generate_noise": lambda self, latent: eps})
    samples = {"samples": work.model.model.process_latent_out(x0)}
    with (
        mock.patch.object(nodes_train.TrainSampler, "_generate_batch_sigmas", lambda *_: sigma.clone()),
        mock.patch.object(nodes_train.comfy_extras.nodes_custom_sampler, "Noise_RandomNoise", lambda seed: noise()),
    ):
        core = Core(work, latents=samples, steps=1)
        core()
    return core.losses[0] / sigma.item() ** 2


def fill(ours: Loop, peft: Peft):
    """The same random LoRA in both."""
    generator = torch.Generator().manual_seed(7)
    theirs = dict(peft.twin.named_parameters())
    with torch.no_grad():
        for name, one in ours.state.lora.items():
            for letter, tensor in (("A", one.A), ("B", one.B)):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 * tensor.shape[1] ** -0.5)
                theirs[f"{name}.lora_{letter}.default.weight"].copy_(tensor)
