"""A picture at 8 steps, side by side: this pack's Sampler node, and core's own nodes with the same settings.

One processor core; on the bundled tiny turbo, where what lies around the model's own work weighs most, or with --wide
on random weights of width 768. From prompt to pixels, which must be the same. They take turns, whoever is first in one
round is second in the next; ratios are core's time over ours within a round. Above 1 the pack is faster.
"""

import argparse
import json
import statistics

import torch

from bench import peers
from bench.peers import CAPTION, Work, clock, pack_module
from bench.step import said

WARM = 2  # rounds
SEED, STEPS = 0, 8


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench sample")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--wide", action="store_true", help="width 768, 256 x 512 pixels, instead of the tiny turbo")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    peers.one_core()
    peers.start_server_object()
    place, work = peers.machine(), Work()
    print(", ".join(f"{name} {value}" for name, value in place.items()), flush=True)
    parts = (work.model if args.wide else tiny(), work.clip, work.vae)
    size = (work.width, work.height) if args.wide else (128, 128)
    ways = {"ours": ours(parts, size), "core": core(parts, size)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        assert torch.equal(ways["ours"](), ways["core"]()), "the pictures differ"
        for number in range(WARM + args.rounds):
            for name in sorted(ways, reverse=number % 2 == 0):
                started = clock()
                ways[name]()
                times[name].append(clock() - started)
    times = {name: seconds[WARM:] for name, seconds in times.items()}
    ratio = [a / b for a, b in zip(times["core"], times["ours"])]
    for name, seconds in times.items():
        print(f"{name:10} {said(seconds, 's')}")
    print(f"{'ratio':10} {said(ratio)}")
    if args.json:
        print(
            json.dumps({"core": round(statistics.median(ratio), 4), "rounds": args.rounds, "wide": args.wide, **place})
        )


def tiny():
    """MODEL of the bundled turbo."""
    from zturbo.hosts import comfy_tiny

    with torch.inference_mode():
        return comfy_tiny.load_model(comfy_tiny.MODEL)


def ours(parts: tuple, size: tuple[int, int]):
    """Our node."""
    node = pack_module("nodes.sample").ZTurboSampler
    node = node.PREPARE_CLASS_CLONE({"hidden_inputs": {pack_module("nodes.sample").io.Hidden.unique_id: "1"}})
    model, clip, vae = parts
    given = {"prompt": CAPTION, "width": size[0], "height": size[1], "steps": STEPS, "seed": SEED}
    given |= {"sampler": "euler", "batch_size": 1}
    return lambda: node.execute(model=model, clip=clip, vae=vae, **given).args[0]


def core(parts: tuple, size: tuple[int, int]):
    """Core's nodes of the official template: encode, zero out, empty latent, KSampler, decode."""
    from comfy_extras.nodes_sd3 import EmptySD3LatentImage

    import nodes

    model, clip, vae = parts

    def draw():
        (positive,) = nodes.CLIPTextEncode().encode(clip, CAPTION)
        (negative,) = nodes.ConditioningZeroOut().zero_out(positive)
        latent = EmptySD3LatentImage.execute(*size).args[0]
        how = (SEED, STEPS, 1.0, "euler", "simple")
        (drawn,) = nodes.KSampler().sample(model, *how, positive, negative, latent)
        return nodes.VAEDecode().decode(vae, drawn)[0]

    return draw
