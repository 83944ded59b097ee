"""Kernel launches and casts of one optimizer step, counted by PyTorch's profiler on a CPU with the bundled tiny model.

A launch is an operation that computes or copies: views and allocations are none, what a foreach or fused operation does
is one, and so is a product of matrices, as on a card. A cast is a copy to
another dtype or device.
"""

import argparse
import json
from collections import Counter

from torch.profiler import ProfilerActivity, profile

from lab.setup import use_comfy

VIEWS = set(
    """
    view as_strided transpose t slice select unsqueeze squeeze expand detach permute alias split chunk narrow unbind
    unflatten flatten set_ to reshape _reshape_alias contiguous resolve_conj resolve_neg numpy_T view_as _conj conj
    view_as_complex movedim expand_as type_as unfold matmul linear _unsafe_view split_with_sizes detach_ lift_fresh
    is_pinned result_type item _local_scalar_dense empty empty_like empty_strided new_empty resize_
    """.split()  # noqa: SIM905
)
WHOLE = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_fused_rms_norm"}  # whatever they do inside
WARM = 30  # steps
WAYS = [(way, dtype, kept) for way in ("merged", "branch") for dtype in ("fp32", "bf16") for kept in (True, False)]


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench launches")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    use_comfy()
    facts = {}
    for way in WAYS:
        counted, casts = count(*way)
        facts[spelled(*way)] = {"launches": counted.total(), "casts": casts}
        most = ", ".join(f"{number} {name}" for name, number in counted.most_common(8))
        print(f"{spelled(*way):34} {counted.total():5} launches, {casts:4} casts: {most}")
    if args.json:
        print(json.dumps(facts))


def spelled(way: str, dtype: str, checkpointing: bool) -> str:
    return f"{way}, {dtype}{', checkpointing' if checkpointing else ''}"


def count(way: str, dtype: str, checkpointing: bool) -> tuple[Counter, int]:
    """(launches by operation, casts) of a step in a run of batch 1 and rank 16 that has seen all shapes."""
    with stepping(way, dtype, checkpointing) as step:
        for _ in range(WARM):
            step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            step()
    found: Counter = Counter()
    casts = sum(launches(event, found) for event in seen.events() if event.cpu_parent is None)
    return found, casts


def launches(event, found: Counter) -> int:
    """Count what the event and those in it launch. Returns the casts among them."""
    space, _, name = event.name.partition("::")
    if space != "aten":
        return sum(launches(child, found) for child in event.cpu_children)
    if name in WHOLE or "_foreach" in name or "_fused_adam" in name or "flash" in name:
        found[name] += 1
        return 0
    if scalar(event):
        return 0
    before = found.total()
    casts = sum(launches(child, found) for child in event.cpu_children)
    if found.total() == before and name not in VIEWS:
        found[name] += 1
    return casts + (name == "_to_copy")


def scalar(event) -> bool:
    """Does it only bring a Python number into an operation's dtype?"""
    return event.name in ("aten::to", "aten::_to_copy", "aten::copy_", "aten::fill_") and event.input_shapes[:1] == [[]]


def stepping(way: str, dtype: str, checkpointing: bool):
    """Context manager of a function that makes one optimizer step."""
    from contextlib import contextmanager

    from zturbo import dataset, lorafile, lowrank, network, optimizers
    from zturbo.batches import pictures_of
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_paths, comfy_tiny, devices
    from zturbo.hosts.comfy import ComfyHost
    from zturbo.objectives import FlowMatching, Split
    from zturbo.plan import Phase
    from zturbo.recipe import Compute, Data, Network, Recipe, Turbo
    from zturbo.state import State
    from zturbo.step import optimizer_step

    @contextmanager
    def opened():
        compute = Compute(dtype, checkpointing, way)
        recipe = Recipe(
            "launches", 20, 1, network=Network(16, 16), compute=compute, turbo=Turbo(every=0), data=Data(cache=False)
        )
        pictures = dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (128,), "zsmile")
        adapter = lorafile.read(comfy_tiny.ADAPTER)
        model = comfy_tiny.load_model(comfy_tiny.MODEL, devices.COMPUTE[dtype])
        model = comfy_adapter.apply(model, adapter, "tiny", 1.0)
        host = ComfyHost(model, comfy_tiny.load_clip(), comfy_load.load_vae(comfy_tiny.VAE), recipe)
        host.dtype = devices.COMPUTE[dtype]  # also where the processor has no bf16
        phase = Phase(FlowMatching(recipe, pictures_of(recipe, pictures, host), host), lambda step: 1e-4)
        lora = network.create(host.targets, recipe.network, 0, host.device)
        state = State(lora, optimizers.build(recipe.optimizer, lowrank.parameters(lora)))
        with host.training(lora) as velocity:
            yield lambda: optimizer_step(recipe.optimizer, phase, state, velocity, Split())

    return opened()
