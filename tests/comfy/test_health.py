"""Gauge, guard and the damage report on the tiny turbo and through the real server."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_host import de_distilled, encode, recipe
from test_server import events, failure, newest_run

from zturbo import dataset, health, lorafile, lowrank, network, phases, recipefile, turbo
from zturbo.family import Z_IMAGE
from zturbo.hosts import comfy_adapter, comfy_paths, comfy_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Network, Turbo
from zturbo.roles import Unattended
from zturbo.runfolder import RunFolder
from zturbo.session import open_session

UNRELATED = "\n".join(
    f"a large {color} {shape} on a white background"
    for color in ("red", "green", "blue")
    for shape in ("circle", "square", "star", "cross")
)
WATCHED = Turbo(prompts=tuple(UNRELATED.splitlines()), size=64)


@pytest.mark.parametrize("way", ["branch", "merged"])
def test_without_its_adapter_a_step_sees_clean_turbo(tiny, way):
    """factor 0 takes the adapter out of the velocity, however it is carried; factor 1 is what trains."""
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.no_grad():
        bare = ComfyHost(model, clip, vae, recipe(turbo=WATCHED))
        carrying = ComfyHost(de_distilled(model), clip, vae, recipe(way, turbo=WATCHED))
        texts, x, sigma = (
            WATCHED.prompts,
            torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)),
            torch.tensor([1.0, 0.6]),
        )
        for host in (bare, carrying):
            host.encode_texts(texts)
        with bare.training({}) as velocity:
            clean = velocity(x, sigma, (0, 5))
        with carrying.training({}) as velocity:
            taken, on = velocity(x, sigma, (0, 5), 0.0), velocity(x, sigma, (0, 5))
            assert torch.equal(on, velocity(x, sigma, (0, 5), 1.0))
    torch.testing.assert_close(taken, clean, rtol=1e-4, atol=1e-5)
    assert (on - clean).norm() > 0.02 * clean.norm()


def test_a_schedule_keeps_no_adapter_of_strengths_that_are_gone(tiny):
    model, clip, vae = tiny
    strengths = ComfyHost(de_distilled(model), clip, vae, recipe("branch"))._strengths()
    scales = [next(iter(strengths(step / 10).values())).scale for step in range(1, 10)]
    assert scales == pytest.approx([scales[0] * step for step in range(1, 10)]) and strengths.cache_info().currsize <= 2


def test_a_checkpoint_whose_adapter_was_taken_away_trains_as_turbo_in_both_ways(tiny):
    """Merged in, and -1 on top: clean turbo, also where nothing may be patched into the weights."""
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.no_grad():
        restored = comfy_adapter.apply(model, lorafile.read(comfy_tiny.ADAPTER), "tiny", -1.0, baked=1.0)
        found, x = [], torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        for way in ("merged", "branch"):
            host = ComfyHost(restored, clip, vae, recipe(way))
            host.encode_texts(("a red star",))
            with host.training({}) as velocity:
                found.append(velocity(x, torch.tensor([0.8]), (0,)))
        host = ComfyHost(model, clip, vae, recipe())
        host.encode_texts(("a red star",))
        with host.training({}) as velocity:
            with_it = velocity(x, torch.tensor([0.8]), (0,))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0] - with_it).norm() > 0.02 * with_it.norm()


def test_an_untrained_lora_reads_zero_and_a_random_one_the_same_in_both_ways(tiny):
    readings = [reading(tiny, way) for way in ("branch", "merged")]
    assert readings[0] > 0.01 and readings[0] == pytest.approx(readings[1], rel=1e-3)


def reading(tiny, way: str) -> float:
    """Of a random LoRA, once an untrained one has read zero."""
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.no_grad():
        host = ComfyHost(de_distilled(model), clip, vae, recipe(way, turbo=WATCHED))
        encode(host)
        first = len(host.features) - health.WATCHED
        with host.training({}) as velocity:
            watched = turbo.references(host.recipe, host, first, 16, velocity)
        assert (
            watched.gauge.states.shape == (8, 1, 16, 8, 8)
            and watched.gauge.sigmas.unique().numel() == health.HIGH
            and watched.guard is None
        )
        lora = network.create(host.targets, Network(4, 4), 0)
        with host.training(lora) as velocity:
            assert watched.read(velocity, 1, host.device)["deviation"] == 0
        for B in lowrank.parameters(lora)[1::2]:
            B.copy_(0.1 * torch.randn(B.shape, generator=torch.Generator().manual_seed(2)))
        with host.training(lora) as velocity:
            found = watched.read(velocity, 2, host.device)
    return found["deviation"]


def test_the_guard_holds_the_model_that_trains_and_the_gauge_needs_turbo(tiny):
    """With a preview_model an undistilled one trains: it is held to itself, and there is no gauge."""
    model, clip, vae = tiny
    assert ComfyHost(de_distilled(model), clip, vae, recipe(), model).turbo  # the same turbo model, wired twice
    for preview_model in (None, comfy_tiny.load_model(comfy_tiny.MODEL)):
        with torch.inference_mode(False), torch.no_grad():
            host = ComfyHost(
                de_distilled(model), clip, vae, recipe(turbo=replace(WATCHED, keep="guard")), preview_model
            )
            encode(host)
            first = len(host.features) - len(WATCHED.prompts)
            with host.training({}) as velocity:
                watched = turbo.references(host.recipe, host, first, 16, velocity)
                own = velocity(
                    watched.guard.states[:, 2],
                    watched.guard.sigmas[:, 2],
                    watched.guard.numbers,
                )
        assert (watched.gauge is None) == (preview_model is not None)
        torch.testing.assert_close(watched.guard.velocities[:, 2], own, rtol=1e-4, atol=1e-4)


def options(**changes) -> dict:
    return prompts.node(
        "ZTurboHealthOptions",
        **{
            "gauge_every": 2,
            "stop_above": 0.0,
            "guard_weight": 1.0,
            "guard_interval": 2,
            "size": 64,
            "prompts": UNRELATED,
            "restore_steps": 10,
            "restore_prompts": "",
            **changes,
        },
    )


def watched_run(server, name: str, keep="off", save=False, changes=None, **training) -> Path:
    graph = prompts.training(name=name, keep_turbo=keep, preview_prompts="", **training)
    graph["health"] = options(**(changes or {}))
    graph["train"]["inputs"]["health_options"] = ["health", 0]
    if save:
        graph["save"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name=name, dtype="fp32", overwrite=True)
    server.run(graph)
    return newest_run(server, name)


def test_gauge_guard_and_their_options_reach_the_run(server):
    run = watched_run(server, "guarded", "guard", changes={"guard_weight": 3.0, "guard_interval": 3}, steps=5)
    given = recipefile.from_toml((run / "recipe.toml").read_text())
    assert given.turbo == Turbo("guard", 3.0, 3, tuple(UNRELATED.splitlines()), 64, 2, restore_steps=10)
    found = events(run)
    assert [event["step"] for event in found if event.get("event") == "health"] == [2, 4, 5]
    assert [event["step"] for event in found if "guard" in event] == [1, 4]


def test_restoring_reaches_the_run_and_leaves_the_concept(server, tiny):
    """Through the real server, adapter and all.

    Turbo comes back, the prompts that name the concept stay away from it.
    """
    asked = "a large zsmile on a pink background\na large zsmile on a white background"
    run = watched_run(
        server,
        "restored",
        "restore",
        changes={"restore_steps": 80, "restore_prompts": asked, "gauge_every": 40},
        steps=120,
        learning_rate=3e-3,
    )
    given = recipefile.from_toml((run / "recipe.toml").read_text())
    assert given.turbo == Turbo(
        "restore",
        1.0,
        2,
        tuple(UNRELATED.splitlines()),
        64,
        40,
        restore_steps=80,
        restore_prompts=tuple(asked.splitlines()),
    )
    found = {event["step"]: event["deviation"] for event in events(run) if event.get("event") == "health"}
    assert sorted(found) == [40, 80, 120] and found[120] < 0.8 * found[40]
    losses = [event["loss"] for event in events(run) if "loss" in event]
    assert len(losses) == 120 and sum(losses[-5:]) < 0.5 * sum(losses[40:45])
    taught, restored = (lorafile.read(run / f"{name}.safetensors").factors for name in ("taught", "lora"))
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.no_grad():
        host, x = (
            ComfyHost(model, clip, vae, recipe()),
            torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1)),
        )
        host.encode_texts((*asked.splitlines(), *UNRELATED.splitlines()[8:10]))
        seen = []
        for lora in ({}, taught, restored):
            with host.training(lora) as velocity:
                seen.append(velocity(x, torch.full((4,), 0.8), (0, 1, 2, 3)))
    clean, before, after = seen
    apart = lambda one, other, rows: (one[rows] - other[rows]).norm()  # noqa: E731
    named, unrelated = slice(0, 2), slice(2, 4)
    assert apart(after, before, named) < apart(after, clean, named) and apart(after, clean, unrelated) < 0.8 * apart(
        before, clean, unrelated
    )


def test_what_is_named_is_held_to_the_lora_and_the_rest_to_clean_turbo_without_the_adapter(tiny, tmp_path):
    model, clip, vae = tiny
    given = recipe(turbo=replace(WATCHED, keep="restore", restore_steps=1, restore_prompts=("a zsmile",)), steps=2)
    pictures = dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (64,), "zsmile", given.data)
    with torch.inference_mode(False):
        host, bare = ComfyHost(de_distilled(model), clip, vae, given), ComfyHost(model, clip, vae, given)
        run = RunFolder.new(tmp_path, given)
        session = open_session(given, pictures, host, run, Unattended(), {}, phases.plan(given))
        for B in lowrank.parameters(session.state.lora)[1::2]:
            B.data.fill_(0.03)
        session.state.losses.append(0.0)
        named, clean = (one.trajectories for one in session.enter_phase().objective.sets)
        captions = len(session.pictures.captions.texts)
        assert named.numbers == (*range(captions), captions + 12) and clean.numbers == tuple(
            range(captions + 8, captions + 12)
        )
        bare.encode(pictures, session.pictures.captions)
        for paths, lora in ((named, session.state.lora), (clean, {})):
            with torch.no_grad(), bare.training(lora) as velocity:
                wanted = health.walk(Z_IMAGE, velocity, paths.numbers, (8, 8), given.seed, host.device)
            torch.testing.assert_close(paths.states, wanted.states, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(paths.velocities, wanted.velocities, rtol=1e-3, atol=1e-3)
        with torch.no_grad(), bare.training({}) as velocity:
            untrained = health.walk(Z_IMAGE, velocity, named.numbers, (8, 8), given.seed, host.device)
        assert (untrained.velocities - named.velocities).abs().max() > 0.02


def test_stop_above_hands_on_the_healthy_lora(server):
    run = watched_run(server, "worn", changes={"stop_above": 0.002}, save=True, steps=60, learning_rate=3e-3)
    notes = [
        event["text"] for event in events(run) if event.get("event") == "note" and "The gauge read" in event["text"]
    ]
    end = events(run)[-1]
    assert end["how"] == "stopped" and 0 < end["saved"] < 60 and len(notes) == 1
    handed, kept = load_file(server.base / "models" / "loras" / "worn.safetensors"), load_file(run / "lora.safetensors")
    assert handed.keys() == kept.keys() and all(torch.equal(handed[key], kept[key].float()) for key in kept)


def test_the_report_reads_what_the_trainer_read(server):
    run = watched_run(server, "reported", save=True, steps=12, learning_rate=3e-3, seed=7)
    reading = [event for event in events(run) if event.get("event") == "health"][-1]["gauge"]
    first = "\n".join(UNRELATED.splitlines()[: health.WATCHED])
    graph = {
        "load": prompts.load(),
        "health": prompts.node(
            "ZTurboHealth",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            file="reported.safetensors",
            prompts=first,
            size=64,
            seed=7,
        ),
    }
    graph |= {
        "plot": prompts.save_image(["health", 2], "test/plot"),
        "pictures": prompts.save_image(["health", 3], "test/pictures"),
    }
    outputs = server.run(graph)
    text = outputs["health"]["text"][0]
    assert reading >= 0.01 and f"Turbo wear {reading:.2f} " in text and "sharpness" in text
    files = {
        name: server.base / "output" / "test" / outputs[name]["images"][0]["filename"] for name in ("plot", "pictures")
    }
    with Image.open(files["pictures"]) as pictures, Image.open(files["plot"]) as plot:
        assert pictures.size == (8 * 64, 2 * 64) and plot.width > 300
        upper, lower = pictures.crop((0, 0, 512, 64)).tobytes(), pictures.crop((0, 64, 512, 128)).tobytes()
    assert upper != lower


def test_a_lora_of_nothing_leaves_turbo_untouched(server):
    nothing = {
        key: torch.zeros_like(tensor)
        for key, tensor in load_file(
            Path(prompts.__file__).parents[1] / "models" / "tiny" / "z_image_turbo_tiny_adapter.safetensors"
        ).items()
    }
    save_file(nothing, server.base / "models" / "loras" / "nothing.safetensors")
    graph = {
        "load": prompts.load(),
        "health": prompts.node(
            "ZTurboHealth",
            model=["load", 0],
            clip=["load", 1],
            vae=["load", 2],
            file="nothing.safetensors",
            prompts=UNRELATED[:35],
            size=64,
            seed=0,
        ),
    }
    text = server.run(graph)["health"]["text"][0]
    assert "Turbo wear 0.00" in text and "untouched" in text and "sharpness 1.00" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "the one connected"}, "connect one to lora"),
        ({"prompts": " \n"}, "There are no prompts"),
        ({"file": "elsewhere.safetensors"}, "does not fit this model"),
    ],
)
def test_bad_input_gets_a_sentence(server, changes, words):
    place = "diffusion_model.layers.29.feed_forward.w1"
    save_file(
        {f"{place}.lora_A.weight": torch.zeros(1, 256), f"{place}.lora_B.weight": torch.zeros(768, 1)},
        server.base / "models" / "loras" / "elsewhere.safetensors",
    )
    save_file(
        {
            "diffusion_model.layers.0.feed_forward.w1.lora_A.weight": torch.zeros(1, 256),
            "diffusion_model.layers.0.feed_forward.w1.lora_B.weight": torch.zeros(768, 1),
        },
        server.base / "models" / "loras" / "small.safetensors",
    )
    inputs = {"file": "small.safetensors", "prompts": "a", "size": 64, "seed": 0, **changes}
    assert words in failure(
        server,
        {
            "load": prompts.load(),
            "health": prompts.node("ZTurboHealth", model=["load", 0], clip=["load", 1], vae=["load", 2], **inputs),
        },
    )


@pytest.mark.parametrize(
    ("node", "changes", "words"),
    [
        ("ZTurboHealth", {"file": "there.safetensors"}, "connect none"),
        ("ZTurboHealth", {"file": "gone.safetensors"}, "There is no 'gone.safetensors'"),
        ("ZTurboCheckAdapter", {"adapter": "tiny (bundled)"}, "connect none"),
    ],
)
def test_a_lora_that_comes_in_two_ways_is_said_when_the_graph_is_queued(server, node, changes, words):
    save_file({"x": torch.zeros(1)}, server.base / "models" / "loras" / "there.safetensors")
    graph = prompts.training(name="said_early", steps=1)
    more = (
        {"file": "the one connected"}
        if node == "ZTurboHealth"
        else {"adapter": "the one connected", "steps": 12, "cfg": 2.0}
    )
    graph["look"] = prompts.node(
        node,
        model=["load", 0],
        clip=["load", 1],
        vae=["load", 2],
        lora=["train", 0],
        prompts="a",
        size=64,
        seed=0,
        **{**more, **changes},
    )
    answer = server.post("/prompt", {"prompt": graph, "client_id": server.client})  # the other outputs run
    assert list(answer["node_errors"]) == ["look"] and words in json.dumps(answer["node_errors"])
    assert "look" not in server.wait(answer["prompt_id"])["outputs"]


def test_readings_are_in_what_the_panel_asks_for(server):
    run = watched_run(server, "panel", steps=4)
    looks = server.get(f"/zturbo/run?name={run.name}")["looks"]
    assert [look["step"] for look in looks if look["event"] == "health"] == [2, 4] and json.dumps(looks)
