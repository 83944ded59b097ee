"""Making an adapter through the real server.

There is a set that is cut off, training on it that is cut off, extraction, and the check.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_quantised import FORMATS, quantised_model, raw, same
from test_server import events, failure, newest_run

import dev
from zturbo import lorafile, runlog
from zturbo.hosts import comfy_adapter, comfy_check, comfy_tiny, comfy_weights

TEMPLATES = "a {small|large} {red|blue|green} {circle|star} on a __ground__ background"
MODEL = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}


def generate(name: str, **changes) -> dict:
    return prompts.node(
        "ZTurboGenerateSet",
        **{
            **MODEL,
            "name": name,
            "count": 12,
            "prompts": TEMPLATES,
            "prompt_file": "",
            "sizes": "128x128, 80x80, 112x144",
            "seed": 3,
            **changes,
        },
    )


def wildcard(server):
    folder = server.base / "input" / "wildcards"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ground.txt").write_text("# grounds\nwhite\npink\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_set_that_was_killed_goes_on_to_the_same_files(server):
    wildcard(server)
    server.run({"load": prompts.load(), "set": generate("whole")})
    whole = server.base / "output" / "zturbo_sets" / "whole"
    assert len(list(whole.glob("*.png"))) == 12
    base = server.base / "second"
    base.mkdir()
    cut = base / "output" / "zturbo_sets" / "whole"
    with dev.Server(server.comfyui, Path(sys.executable), base) as doomed:
        wildcard(doomed)
        doomed.queue({"load": prompts.load(), "set": generate("whole")})
        deadline = time.monotonic() + 60
        while not list(cut.glob("*.txt")) and time.monotonic() < deadline:
            time.sleep(0.005)
        doomed.process.kill()
        doomed.process.wait()
    there = {path.stem: path.stat().st_mtime_ns for path in cut.glob("*.txt")}
    assert 0 < len(there) < 12
    with dev.Server(server.comfyui, Path(sys.executable), base) as again:
        again.run({"load": prompts.load(), "set": generate("whole")})
    assert contents(cut) == contents(whole)
    # nothing is drawn twice
    assert all((cut / f"{name}.txt").stat().st_mtime_ns == when for name, when in there.items())


def test_a_set_that_was_cancelled_keeps_what_is_drawn_and_goes_on(server):
    wildcard(server)
    sets = server.base / "output" / "zturbo_sets"
    job = server.queue({"load": prompts.load(), "set": generate("cancelled", count=40)})
    deadline = time.monotonic() + 60
    while not list((sets / "cancelled").glob("*.txt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    server.post("/interrupt", {})
    assert "interrupted" in dev.error_message(server.wait(job))
    kept = sorted(path.stem for path in (sets / "cancelled").glob("*.txt"))
    listed = [json.loads(line)["file"] for line in (sets / "cancelled" / "pictures.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < 40 and listed == [f"{stem}.png" for stem in kept]
    server.run({"load": prompts.load(), "set": generate("cancelled", count=40)})
    server.run({"load": prompts.load(), "set": generate("not_cancelled", count=40)})
    assert len(contents(sets / "cancelled")) == 82 and contents(sets / "cancelled") == contents(sets / "not_cancelled")
    graph = {"load": prompts.load(), "set": generate("cancelled", count=40, seed=4)}
    assert "was begun with other seed" in failure(server, graph)


def test_prompts_come_from_files_in_the_input_folder(server):
    wildcard(server)
    (server.base / "input" / "more.txt").write_text(
        "# shapes\na green ring\n\na blue cross on a __ground__ background\n", encoding="utf-8-sig"
    )
    graph = {
        "load": prompts.load(),
        "set": generate("from_file", count=6, prompts="a red star", prompt_file="more.txt", sizes="64x64"),
    }
    server.run(graph)
    captions = [
        (server.base / "output" / "zturbo_sets" / "from_file" / f"{number:06d}.txt").read_text() for number in range(6)
    ]
    assert captions[:2] == captions[3:5] == ["a red star", "a green ring"] and {captions[2], captions[5]} <= {
        f"a blue cross on a {ground} background" for ground in ("white", "pink")
    }
    (server.base / "input" / "more.txt").write_text("a green ring\n")
    assert "other prompts, wildcards" in failure(server, graph)


def test_the_pictures_are_the_samplers_own(server):
    wildcard(server)
    server.run({"load": prompts.load(), "set": generate("same", count=3)})
    line = json.loads((server.base / "output" / "zturbo_sets" / "same" / "pictures.jsonl").read_text().splitlines()[1])
    graph = {
        "load": prompts.load(),
        "draw": prompts.sample(
            ["load", 0], prompt=line["prompt"], width=line["width"], height=line["height"], seed=line["seed"]
        ),
    }
    output = server.run({**graph, "save": prompts.save_image(["draw", 0], "test/same")})["save"]["images"][0]
    with (
        Image.open(server.base / "output" / "test" / output["filename"]) as one,
        Image.open(server.base / "output" / "zturbo_sets" / "same" / line["file"]) as two,
    ):
        assert one.tobytes() == two.tobytes()


def adapter_graph(name: str, steps: int) -> dict:
    graph = {"load": prompts.load(), "set": generate(name), "dataset": prompts.dataset(folder=["set", 0], trigger="")}
    graph["train"] = prompts.train(
        ["load", 0], ["dataset", 0], name=name, steps=steps, preview_prompts="", learning_rate=3e-4
    )
    graph["save"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name=name, dtype="fp32", overwrite=True)
    graph["check"] = prompts.node(
        "ZTurboCheckAdapter",
        **MODEL,
        adapter="the one connected",
        prompts="a large red star on a white background",
        size=64,
        steps=12,
        cfg=2.0,
        seed=0,
        lora=["train", 0],
    )
    return graph


def wait_for_step(server, name: str, step: int):
    """Until the run's log has come to this step."""
    deadline = time.monotonic() + 120
    while (
        sum("loss" in event for event in runlog.read_events(server.base / "output" / "zturbo" / name / "events.jsonl"))
        < step
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lora_of(server, name: str) -> dict:
    return load_file(server.base / "models" / "loras" / f"{name}.safetensors")


def assert_same_bits(a: dict, b: dict):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_training_on_a_set_that_was_cut_off_goes_on_to_the_same_bits(server):
    """Once cancelled, once killed."""
    wildcard(server)
    server.run(adapter_graph("own_whole", 40))
    graph = adapter_graph("own_cut", 40)
    graph["set"]["inputs"]["name"] = "own_whole"
    job = server.queue(graph)
    wait_for_step(server, "own_cut", 5)
    server.post("/interrupt", {})
    server.wait(job)
    run = newest_run(server, "own_cut")
    assert events(run)[-1]["how"] == "cancelled" and 5 <= events(run)[-1]["saved"] < 40
    outputs = server.run(graph)
    assert newest_run(server, "own_cut") == run and "Sharpness with the adapter on" in outputs["check"]["text"][0]
    assert_same_bits(lora_of(server, "own_cut"), lora_of(server, "own_whole"))

    sets = Path("output") / "zturbo_sets" / "own_whole"
    shutil.copytree(server.base / sets, server.base / "third" / sets)
    graph["saving"] = prompts.node("ZTurboSavingOptions", every=5, keep=2, dtype="bf16")
    graph["train"]["inputs"]["saving_options"] = ["saving", 0]
    with dev.Server(server.comfyui, Path(sys.executable), server.base / "third") as doomed:
        wildcard(doomed)
        doomed.queue(graph)
        wait_for_step(doomed, "own_cut", 12)
        doomed.process.kill()
        doomed.process.wait()
    with dev.Server(server.comfyui, Path(sys.executable), server.base / "third") as again:
        again.run(graph)
    log = events(again.base / "output" / "zturbo" / "own_cut")
    learnt = [event["step"] for event in log if "loss" in event]
    assert (
        sorted(set(learnt)) == list(range(1, 41))
        and log[-1]["how"] == "finished"
        and sum(event.get("event") == "start" for event in log) == 2
    )
    assert_same_bits(lora_of(again, "own_cut"), lora_of(server, "own_whole"))


def test_the_bundled_adapter_is_done_and_an_empty_one_is_not(server):
    nothing = {key: torch.zeros_like(tensor) for key, tensor in load_file(comfy_tiny.ADAPTER).items()}
    save_file(nothing, server.base / "models" / "loras" / "no_adapter.safetensors")
    things = [("red star", "white"), ("blue cross", "pink"), ("green ring", "gray"), ("white square", "black")]
    asked = "\n".join(f"a large {thing} on a {ground} background" for thing, ground in things * 2)
    graph = {"load": prompts.load()}
    for name, file in (("own", prompts.TINY), ("none", "no_adapter.safetensors")):
        graph[name] = prompts.node(
            "ZTurboCheckAdapter", **MODEL, adapter=file, prompts=asked, size=128, steps=24, cfg=2.0, seed=1
        )
    outputs = server.run(graph)
    assert outputs["own"]["text"][0].startswith("Done"), outputs["own"]["text"][0]
    assert outputs["none"]["text"][0].startswith("Not done") and " 1.00 at 8 steps" in outputs["none"]["text"][0]


def test_the_three_rows_are_what_the_settings_say(server):
    """The rows are turbo at 8 steps, with the adapter at 8 steps, with it at many, guided.

    They are core's KSampler's to the pixel.
    """
    asked = ("a large red star on a white background", "a large blue cross on a pink background")
    graph = {"load": prompts.load(), "on": prompts.adapter(["load", 0])}
    graph["check"] = prompts.node(
        "ZTurboCheckAdapter",
        **MODEL,
        adapter=prompts.TINY,
        prompts="\n".join(asked),
        size=80,
        steps=10,
        cfg=3.0,
        seed=5,
    )
    graph["save"] = prompts.save_image(["check", 2], "test/check")
    graph["none"] = prompts.node("CLIPTextEncode", clip=["load", 1], text="")
    graph["empty"] = prompts.node("EmptySD3LatentImage", width=80, height=80, batch_size=1)
    places = [(row, column) for row in range(3) for column in range(2)]
    for row, column in places:
        model, steps, cfg = ((["load", 0], 8, 1.0), (["on", 0], 8, 1.0), (["on", 0], 10, 3.0))[row]
        here = f"{row}{column}"
        graph[f"text{here}"] = prompts.node("CLIPTextEncode", clip=["load", 1], text=asked[column])
        ends = {"positive": [f"text{here}", 0], "negative": ["none", 0], "latent_image": ["empty", 0]}
        graph[f"draw{here}"] = prompts.node(
            "KSampler",
            model=model,
            seed=5,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
            **ends,
        )
        graph[f"image{here}"] = prompts.node("VAEDecode", samples=[f"draw{here}", 0], vae=["load", 2])
        graph[f"save{here}"] = prompts.save_image([f"image{here}", 0], f"test/check_{here}_")
    outputs = server.run(graph)

    def picture(node) -> np.ndarray:
        with Image.open(server.base / "output" / "test" / outputs[node]["images"][0]["filename"]) as one:
            return np.asarray(one)

    grid = picture("save")
    assert grid.shape == (240, 160, 3)
    for row, column in places:
        assert np.array_equal(
            grid[row * 80 : row * 80 + 80, column * 80 : column * 80 + 80], picture(f"save{row}{column}")
        ), (row, column)


@pytest.mark.parametrize(
    ("short", "long", "word"),
    [(0.8, 1.0, "Done"), (1.0, 1.0, "Train longer"), (0.8, 0.7, "forgotten"), (0.7, 0.85, "Nearly")],
)
def test_the_verdict(short, long, word):
    done, text = comfy_check.verdict(short, long, 24, 2.0, "x.safetensors")
    assert word in text and done == (word == "Done") and f"{short:.2f} at 8 steps" in text


def test_an_adapter_is_extracted_from_two_models(server):
    """Turbo with the bundled adapter on, minus turbo: the bundled adapter again."""
    graph = {"load": prompts.load(), "on": prompts.adapter(["load", 0])}
    graph["extract"] = prompts.node(
        "ZTurboExtractAdapter",
        undistilled=["on", 0],
        turbo=["load", 0],
        rank=8,
        name="extracted",
        dtype="fp32",
        overwrite=True,
    )
    text = server.run(graph)["extract"]["text"][0]
    made, adapter = (
        lorafile.read(server.base / "models" / "loras" / "extracted.safetensors").factors,
        lorafile.read(comfy_tiny.ADAPTER).factors,
    )
    assert made.keys() == adapter.keys() and f"{len(adapter)} matrices at rank 8" in text and "0.0%" in text
    for name, one in adapter.items():
        torch.testing.assert_close(made[name].delta(), one.delta(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_is_extracted_from_quantised_weights(comfyui, kind):
    """Both models' dequantised weights are compared, whatever they are stored as; the model stays as it was."""
    adapter, quantised = lorafile.read(comfy_tiny.ADAPTER), quantised_model(kind)
    before = raw(quantised)
    with torch.inference_mode():
        made = comfy_weights.extracted(comfy_adapter.apply(quantised, adapter, "a", 1.0), quantised, 8, "1")
    assert same(raw(quantised), before) and made.error < 1e-3
    for name, one in adapter.factors.items():
        torch.testing.assert_close(made.factors[name].delta(), one.delta().float(), rtol=0, atol=1e-4)


def test_extract_adapter_through_the_server_refuses_turbo_twice(server):
    graph = {
        "load": prompts.load(),
        "extract": prompts.node(
            "ZTurboExtractAdapter",
            undistilled=["load", 0],
            turbo=["load", 0],
            rank=8,
            name="nothing_new",
            dtype="bf16",
            overwrite=False,
        ),
    }
    assert "the same in every matrix" in failure(server, graph)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": "100x100"}, "multiples of 16"),
        ({"prompts": "\n"}, "There are no prompts"),
        ({"prompts": "a __nowhere__"}, "nowhere.txt"),
        ({"prompt_file": "../secret.txt"}, "not inside ComfyUI's input folder"),
        ({"prompt_file": "missing.txt"}, "no file 'missing.txt'"),
        ({"name": "a/b"}, "cannot be a file name"),
        ({"model": ["adapter", 0]}, "carries the de-distill adapter"),
        ({"prompts": "a {red|__nowhere__} star"}, "nowhere.txt"),
    ],
)
def test_bad_input_gets_a_sentence(server, changes, words):
    wildcard(server)
    graph = {
        "load": prompts.load(),
        "adapter": prompts.adapter(["load", 0]),
        "set": generate(**{"name": "bad", **changes}),
    }
    if "model" not in changes:
        del graph["adapter"]
    assert words in failure(server, graph)
