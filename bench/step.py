"""One training step, side by side on the same work: this pack (branch, merged) and diffusers with PEFT.

The bundled tiny model in fp32, the same batch, the same LoRA targets and rank. Rounds are interleaved
(A B C A B C …); printed are medians with minimum and maximum, and ratios to diffusers with PEFT.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from lab.setup import ROOT, use_comfy

RANK = 16


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench step")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    use_comfy()
    sys.path.append(str(ROOT / "tests" / "comfy"))
    times = measure(args.rounds, args.batch)
    peer = statistics.median(times["diffusers + peft"])
    facts = {}
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        facts[name] = fact = {
            "median_ms": round(middle * 1e3, 1),
            "min_ms": round(min(seconds) * 1e3, 1),
            "max_ms": round(max(seconds) * 1e3, 1),
            "ratio": round(middle / peer, 3),
        }
        spread = f"(min {fact['min_ms']}, max {fact['max_ms']})"
        print(f"{name:18} median {fact['median_ms']:8} ms  {spread}  {fact['ratio']} x diffusers + peft")
    if args.json:
        print(json.dumps(facts))


def measure(rounds: int, batch: int) -> dict[str, list[float]]:
    """Seconds of forward, backward and nothing else, by contender."""
    import diffusers_twin
    from peft import LoraConfig

    from zturbo import dataset, lorafile, lowrank, network
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_paths, comfy_tiny
    from zturbo.hosts.comfy import ComfyHost
    from zturbo.recipe import Compute, Network, Recipe

    clip, vae = comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE)
    pictures = dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (128,), "zsmile")
    adapter = lorafile.read(comfy_tiny.ADAPTER)
    x, sigma = torch.randn(batch, 16, 16, 16), torch.rand(batch)
    numbers = tuple(n for (n, *_) in pictures.captions().of[:batch])
    contenders = {}
    contexts = []
    for way in ("branch", "merged"):
        recipe = Recipe(network=Network(RANK, RANK), compute=Compute("fp32", False, way))
        host = ComfyHost(
            comfy_adapter.apply(comfy_tiny.load_model(comfy_tiny.MODEL), adapter, "tiny", 1.0), clip, vae, recipe
        )
        host.encode(pictures, pictures.captions())
        lora = network.create(host.targets, Network(RANK, RANK), 0)
        context = host.training(lora)
        contexts.append(context)
        contenders[way] = (context.__enter__(), lowrank.parameters(lora))
    twin = diffusers_twin.build(host.dit, comfy_tiny.config()["unet_config"])  # the merged weights: W + A
    twin.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=r"layers\.\d+\..*(to_q|to_k|to_v|to_out\.0|w1|w2|w3|adaLN_modulation\.0)",
        )
    )
    captions = [host.features[n][0] for n in numbers]
    contenders["diffusers + peft"] = (
        lambda x, s, _: diffusers_twin.velocity(twin, x, s, captions),
        [p for p in twin.parameters() if p.requires_grad],
    )
    counts = {name: sum(p.numel() for p in parameters) for name, (_, parameters) in contenders.items()}
    assert len(set(counts.values())) == 1, counts
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, (velocity, parameters) in contenders.items():
            started = time.perf_counter()
            velocity(x, sigma, numbers).square().mean().backward()
            if turn >= 2:  # the first rounds warm up
                times[name].append(time.perf_counter() - started)
            for parameter in parameters:
                parameter.grad = None
    for context in contexts:
        context.__exit__(None, None, None)
    return times
