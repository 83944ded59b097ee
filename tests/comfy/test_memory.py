"""What a run is said to need of memory against what it takes.

Also weights that go back to their file, and refusals before anything is done.
"""

import itertools
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.lumina.model
import comfy.model_management
import comfy.ops
import pytest
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent))
from test_host import de_distilled, pictures, recipe

from bench.gpu_files import FULL
from zturbo import keeping, lowrank, memory, network, optimizers
from zturbo.block import Keep
from zturbo.errors import ZTurboError
from zturbo.hosts import (
    comfy_adapter,
    comfy_blocks,
    comfy_draw,
    comfy_forward,
    comfy_load,
    comfy_memory,
    comfy_needs,
    comfy_run,
    comfy_tiny,
    devices,
    room,
)
from zturbo.hosts import tiny as tiny_model
from zturbo.hosts.comfy import ComfyHost
from zturbo.hosts.comfy_forward import checkpointed
from zturbo.hosts.comfy_lend import fetchers, normal_norms
from zturbo.keeping import Sizes
from zturbo.memory import Need
from zturbo.recipe import OPTIMIZERS, Compute, Network, Optimizer, Recipe, Turbo

CPU = torch.device("cpu")


def transformer(dtype, device, **changes):
    """NextDiT of Z-Image's proportions."""
    settings = {key: value for key, value in (FULL | changes).items() if key != "image_model"}
    return comfy.ldm.lumina.model.NextDiT(
        **settings, device=device, dtype=dtype, operations=comfy.ops.manual_cast
    ).requires_grad_(False)


@contextmanager
def step(dit, tokens: int, dtype, device, run_layer=None):
    """(the velocity of half the tokens as a picture, the other half as its caption; a LoRA).

    The LoRA is of rank 1 on every matrix of the layers.
    """
    targets = comfy_adapter.targets(dit, ("layers.",))
    lora = network.create(targets, Network(1, 1), 0, device)
    x = torch.randn(1, 16, tokens // 2 // 8 * 2, 16, dtype=dtype, device=device)
    caption = torch.randn(1, tokens // 2, dit.dim, dtype=dtype, device=device)
    with lowrank.attached(fetchers(dit), targets, [{}, lora]), normal_norms(dit):
        yield comfy_forward.velocity(dit, x, torch.full((1,), 0.5, device=device), caption, run_layer), lora


def test_what_a_layer_keeps_for_its_backward(monkeypatch):
    """Counted on autograd's graph, at a fifth of the width with all proportions of the real one; a card held 28.2."""
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    kept = []
    for layers in (1, 3):
        dit = transformer(torch.float32, "cpu", dim=768, n_heads=6, n_kv_heads=6, n_layers=layers, n_refiner_layers=0)
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        seen: dict[int, int] = {}

        def keep(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with step(dit, 320, torch.float32, "cpu") as (_, lora):
                kept.append(sum(seen.values()) - 4 * lowrank.count(lora))
    assert (kept[1] - kept[0]) / 2 / (320 * 768 * 4) == pytest.approx(memory.KEPT, rel=0.1)


@pytest.mark.parametrize("keep", Keep)
def test_a_plan_is_what_a_step_takes(keep):
    """Counted by PyTorch's profiler, at a fifth of the width with all proportions of the real one."""
    like = torch.zeros(1)
    for layers in (1, 3):
        dit = transformer(torch.float32, "cpu", dim=768, n_heads=6, n_kv_heads=6, n_layers=layers, n_refiner_layers=1)
        for parameter in dit.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        targets = comfy_adapter.targets(dit, ("layers.",))
        lora = network.create(targets, Network(16, 16), 0)
        found = comfy_blocks.Fast(dit, fetchers(dit), comfy_adapter.targets(dit), lora, like)
        time, rope = torch.randn(1, 256), torch.ones(576, 1, 64, dtype=torch.complex64)

        def step(blocks=found.layers, time=time, rope=rope):
            tokens = torch.randn(1, 576, 768)
            for block in blocks:
                block.keep = keep
                tokens = block(tokens, time, (rope, rope))
            error = tokens.sum()
            del tokens
            error.backward()

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
        planned = keeping.needed(Sizes(layers, 768, 2048, 6, 7 * 16, 4), 576, (keep,) * layers)
        gradients = 4 * lowrank.count(lora) / layers  # of the last block, at the height
        assert highest(seen) - gradients == pytest.approx(planned, rel=0.02)


def highest(seen) -> int:
    """Most bytes at once."""
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(itertools.accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())))


@pytest.mark.parametrize("run_layer", [None, checkpointed])
def test_a_step_at_the_real_size_makes_every_tensor_where_the_model_is(run_layer, monkeypatch):
    """On the meta device a tensor that was made elsewhere is refused, as on a card."""
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    dit = transformer(torch.bfloat16, "meta")
    with step(dit, 512, torch.bfloat16, "meta", run_layer) as (v, lora):
        gradients = torch.autograd.grad(v.float().square().mean(), lowrank.parameters(lora))
    assert v.device.type == "meta" and v.dtype == torch.bfloat16 and {g.dtype for g in gradients} == {torch.float32}
    with pytest.raises(RuntimeError):
        comfy_forward.velocity(dit, torch.zeros(1, 16, 32, 32), torch.ones(1), torch.zeros(1, 32, 3840))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_for_each_number(name):
    pytest.importorskip(
        {"adamw8bit": "bitsandbytes"}.get(name, "torch" if name in ("adamw", "muon") else "pytorch_optimizer")
    )
    parameters = [torch.randn(16, 3840, requires_grad=True), torch.zeros(3840, 16, requires_grad=True)]
    optimizer = optimizers.build(Optimizer(name, 1.0 if name == "prodigy" else 1e-4), parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = {
        t.data_ptr(): t.nbytes
        for one in optimizer.state.values()
        for t in torch.utils._pytree.tree_leaves(one)
        if isinstance(t, torch.Tensor)
    }
    assert sum(state.values()) / sum(p.numel() for p in parameters) == pytest.approx(memory.STATE[name], rel=0.05)


def test_counting_before_anything_is_made(tiny):
    host = ComfyHost(*tiny, recipe())
    for kind in ("lora", "loha"):
        given = Network(4, 4.0, kind, targets="attention:8, feed_forward", layers="1-2")
        assert network.count(host.targets, given) == lowrank.count(network.create(host.targets, given, 0))


def test_tokens_are_guessed_close_to_what_the_encoder_makes(tiny):
    model, clip, _ = tiny
    for caption in (
        "a cat",
        "zvk, a photograph of a small red house at the end of a long road, in the evening, with lamps lit",
        "ein Haus, große Bäume " * 12,
    ):
        with torch.inference_mode():
            real = 256 + memory.padded(comfy_draw.encode_prompt(clip, caption)[0][0].shape[1])
        assert real <= memory.tokens(256 * 256, caption) <= 1.3 * real


def test_what_cannot_fit_is_refused_before_a_run_folder_is_made(tiny, output, monkeypatch):
    monkeypatch.setattr(comfy_run, "_send", lambda event, data: None)
    monkeypatch.setattr(room, "main_memory", lambda: 10e6)
    with pytest.raises(
        ZTurboError,
        match=r"This run needs .* GB .* of main memory beside the weights, and 0.0 GB are free. .* a lower resolution",
    ):
        comfy_run.train(recipe(), pictures(), comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1")
    with pytest.raises(ZTurboError, match="GB the LoRA with its optimizer .* GB a preview while it is drawn"):
        room.check(CPU, [], [Need("the LoRA with its optimizer", 1e9), Need("a preview while it is drawn", 1e15)], 0)
    assert not list(output.glob("zturbo/*"))


def test_a_card_is_asked_for_what_it_has(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.setattr(devices, "total_memory", lambda device: 8_000_000_000)
    # weights may come and go, and previews may fail
    room.check(card, [Need("a", 7e9)], [Need("a preview", 1e12)], 12e9)
    with pytest.raises(
        ZTurboError, match=r"7.0 GB a \+ 1.0 GB b = 8.0 GB on the NVIDIA card beside the weights, which has 7.5 GB"
    ):
        room.check(card, [Need("a", 7e9), Need("b", 1e9)], [], 12e9)


GB8 = {"batch_size": 4, "compute": Compute("bf16", False)}
WIDE = {"network": Network(128, 128)}


@pytest.mark.parametrize("gigabytes, side, settings, fits", [
    (8, 512, {}, True), (8, 1024, {}, True), (8, 512, GB8, True), (8, 1024, {"turbo": Turbo(keep="guard")}, True),
    (2, 1024, {}, False), (6, 1024, WIDE, False), (16, 1024, WIDE, True), (6, 2048, {}, False), (12, 2048, {}, True),
])  # fmt: skip
def test_which_runs_fit_a_card_at_the_real_size(gigabytes, side, settings, fits, monkeypatch):
    """One picture at a time with recomputation, which a run on a card falls back to.

    There 2.3 GB at 1024 without the optimizer's state was measured.
    """
    dit, given = (
        transformer(torch.bfloat16, "meta"),
        Recipe(**{"network": Network(16, 16), "compute": Compute("bf16", True), **settings}),
    )
    host = ComfyHost.__new__(ComfyHost)
    host.recipe, host.dit, host.device, host.dtype, host.tag, host.way = (
        given,
        dit,
        torch.device("cuda"),
        torch.bfloat16,
        None,
        "branch",
    )
    tokens = memory.together(given, memory.tokens(side**2, "a cat"), memory.tokens(512**2, "a cat"), 1)
    numbers = network.count(comfy_adapter.targets(dit, ("layers.",)), given.network)
    least = keeping.plan(comfy_needs.sizes_of(host, None), tokens, 0)
    needs = comfy_needs.of_step(host, numbers, tokens, least.bytes)
    monkeypatch.setattr(devices, "total_memory", lambda device: gigabytes * 10**9)
    if fits:
        return room.check(host.device, needs, [], 12.3e9)
    with pytest.raises(ZTurboError, match=f"which has {gigabytes - 0.5:.1f} GB"):
        room.check(host.device, needs, [], 12.3e9)


def test_a_device_that_fails_to_tell_its_memory_leaves_no_folder_and_no_lock(tiny, output, monkeypatch):
    monkeypatch.setattr(comfy_run, "_send", lambda event, data: None)
    given = replace(recipe(), steps=1, turbo=Turbo(every=0))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="driver"):
        patch.setattr(room, "check", lambda *_: (_ for _ in ()).throw(RuntimeError("driver")))
        comfy_run.train(given, pictures(), comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1")
    assert not list((output / "zturbo").glob("my_lora*"))
    assert (
        comfy_run.train(given, pictures(), comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1").path.parent.name
        == "my_lora"
    )


def test_a_run_that_has_ended_hands_on_what_it_has_however_short_memory_is(tiny, output, monkeypatch):
    monkeypatch.setattr(comfy_run, "_send", lambda event, data: None)
    given = replace(recipe(), steps=2, turbo=Turbo(every=0))
    first = comfy_run.train(given, pictures(), comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1")
    monkeypatch.setattr(room, "ASIDE", 1e15)
    again = comfy_run.train(given, pictures(), comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1")
    assert again.path == first.path and again.losses == first.losses
    with pytest.raises(ZTurboError, match="are free"):
        comfy_run.train(replace(given, seed=1), pictures(), comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1")
    assert [path.name for path in (output / "zturbo").glob("my_lora*")] == ["my_lora"]


def test_files_that_main_memory_cannot_hold_are_refused_before_any_is_loaded(tmp_path, monkeypatch):
    """A text encoder of ten terabytes: a file of holes."""
    path = tmp_path / "qwen_3_4b.safetensors"
    with open(path, "wb") as file:
        file.truncate(10**13)
    monkeypatch.setattr(comfy_tiny, "load_model", None)  # nothing is loaded
    with pytest.raises(
        ZTurboError,
        match=r"lie there together: 10000.0 GB qwen_3_4b.safetensors, and .* GB are free.* an fp8 text encoder",
    ):
        comfy_load.load(comfy_tiny.MODEL, path)


def in_file(tensor: torch.Tensor, path: Path) -> bool:
    """Whether its memory is a file's; asked of Linux, which tells."""
    maps = (line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path)))
    return any(
        int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in (words[0].split("-") for words in maps)
    )


def test_a_text_encoder_on_a_cpu_goes_back_to_its_file(comfyui, tmp_path):
    """The same numbers from then on, read from the file.

    What is not the file's stays; main memory has its room back.
    """
    weights = {f"model.{name}": tensor for name, tensor in tiny_model.text_encoder_weights().items()}
    save_file(weights, tmp_path / "te.safetensors")
    del weights
    with torch.inference_mode():
        clip = comfy_tiny.load_clip()
        before = comfy_draw.encode_prompt(clip, "a house")[0][0].clone()
        changed = clip.cond_stage_model.qwen3_4b.transformer.model.layers[0].mlp.up_proj
        changed.weight += 1
    assert comfy_memory.to_file(clip.patcher) == 0  # nothing is known of a file
    clip.patcher.cached_patcher_init = (None, ([str(tmp_path / "te.safetensors")], None))
    with torch.inference_mode():
        after = comfy_draw.encode_prompt(clip, "a house")[0][0].clone()
        held = [
            StorageWeakRef(p.untyped_storage()) for p in clip.cond_stage_model.parameters() if p is not changed.weight
        ]
        sizes = sum(p.nbytes for p in clip.cond_stage_model.parameters())
        moved = comfy_memory.to_file(clip.patcher)
        assert sizes - changed.weight.nbytes - 8 <= moved < sizes
        assert sum(not one.expired() for one in held) <= 1  # logit_scale is no file's
        if sys.platform == "linux":
            there = {
                name: in_file(p, tmp_path / "te.safetensors") for name, p in clip.cond_stage_model.named_parameters()
            }
            assert sum(there.values()) > len(there) - 3 and not in_file(changed.weight, tmp_path / "te.safetensors")
        assert comfy_memory.to_file(clip.patcher) == 0  # it lies there
        assert torch.equal(comfy_draw.encode_prompt(clip, "a house")[0][0], after) and not torch.equal(after, before)
        changed.weight -= 1
        assert comfy_draw.encode_prompt(clip, "a house")[0][0].sub(before).abs().max() < 1e-3


@pytest.mark.parametrize("gigabytes, together", [(30, 0), (16, 4), (11, 1), (5, 4), (1.5, 1), (0.5, 1)])
def test_as_many_pictures_go_through_together_as_there_is_room_for_on_a_card(monkeypatch, gigabytes, together):
    """Of eight that need a GB each beside ten of weights; where not one has room there, beside none of them."""
    host = SimpleNamespace(
        device=torch.device("cuda"),
        recipe=Recipe(batch_size=8),
        whole=30,
        model=SimpleNamespace(model_size=lambda: 10e9),
    )
    monkeypatch.setattr(devices, "total_memory", lambda device: gigabytes * 1e9 + room.ASIDE)
    monkeypatch.setattr(comfy_needs, "at_least", lambda host, lora, at_once, whole, fast: 1e9 * (at_once or 8))
    assert comfy_needs.fitting(host, {}, fast=True) == together
