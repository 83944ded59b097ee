"""The shipped workflows: what is in each of them. Notes are in lab/notes, the form in `graph`."""

import json
import sys
import tempfile
from pathlib import Path

import tomllib

import dev
from zturbo.recipe import Turbo

from .graph import DOWNLOADS, Graph, Node, words
from .setup import ROOT, TINY, log
from .workflows import WORKFLOWS

SUBGRAPHS = ROOT / "subgraphs"
MODEL, TEXT, VAE, ADAPTER, UNDISTILLED = DOWNLOADS
FOX = "a red fox in fresh snow, morning light, photo"
ME = "portrait photo of [trigger] in a cafe, window light"  # the trainer and Compare LoRAs know the word
MINE = f"{ME}\n[trigger] as an oil painting\n{FOX}"
BUNDLED = "tiny (bundled)"


# Parts that several graphs have


def loader(graph: Graph, tiny: bool = False) -> Node:
    files = (BUNDLED, "auto", "auto") if tiny else (MODEL, TEXT, VAE)
    return graph.add("ZTurboLoadModel", **dict(zip(("diffusion_model", "text_encoder", "vae"), files)))


def parts(load: Node) -> dict:
    return {"model": load["model"], "clip": load["clip"], "vae": load["vae"]}


def trained(graph: Graph, load: Node, data: dict, train: dict, adapter: str = ADAPTER) -> tuple[Node, Node, Node, Node]:
    """(adapter, dataset, train, save). data, train: values of the dataset's and the Train node."""
    on = graph.add("ZTurboDeDistillAdapter", model=load["model"], adapter=adapter)
    pictures = graph.add("ZTurboImageDataset", **{"folder": "my_pictures", "trigger": "zvk_me", **data})
    usual = {"name": "my_lora", "steps": 2000, "preview_prompts": ME, "preview_seed": 42}
    wires = {**parts(load), "model": on["model"], "dataset": pictures["dataset"]}
    trainer = graph.add("ZTurboTrainLoRA", **{**usual, **train}, **wires)
    name = trainer.values["name"]
    return on, pictures, trainer, graph.add("ZTurboSaveLoRA", lora=trainer["lora"], name=name)


def compared(graph: Graph, load: Node, prefix: str, **values) -> tuple[Node, Node]:
    """(compare, save)."""
    compare = graph.add("ZTurboCompare", **{"loras": "", "prompts": MINE, "seed": 42, **parts(load), **values})
    return compare, graph.add("SaveImage", images=compare["grid"], filename_prefix=prefix)


def sampler(graph: Graph, load: Node, model, title: str, prompt: str = ME) -> Node:
    spelled = prompt.replace("[trigger]", "zvk_me")
    return graph.add("ZTurboSampler", title, **{**parts(load), "model": model}, prompt=spelled, seed=42)


# The graphs


def training(graph: Graph, data: dict | None = None, train: dict | None = None, more: tuple = (), **compare) -> Node:
    """Load, adapter, pictures, train, save, before and after. Gives the Train node. more: nodes above it."""
    load = loader(graph)
    on, pictures, trainer, save = trained(graph, load, data or {}, train or {})
    compare = {"prefix": f"zturbo/{trainer.values['name']}_before_after", "lora": trainer["lora"], **compare}
    grid, picture = compared(graph, load, **compare)
    graph.lay_out(
        [("1. The model, and its adapter at +1", [[load], [on]]), ("2. Your pictures", [[pictures]])],
        [("3. Train", [[*more, trainer]])],
        [("4. The LoRA, before and after", [[save, grid], [picture]])],
    )
    return trainer


def train_lora(graph: Graph):
    training(graph)


def train_lora_16gb(graph: Graph):
    training(graph, {"resolution": 768}, {"preview_width": 768, "preview_height": 768}, width=768, height=768)


def train_lora_12gb(graph: Graph):
    training(graph, {"resolution": 512}, {"preview_width": 768, "preview_height": 768}, width=768, height=768)


def train_lora_app(graph: Graph):
    """As a form: what a first-timer fills in, the panel, and the pictures that come out."""
    name = graph.add("PrimitiveString", "Name of the LoRA", value="my_lora")
    trainer = training(graph, more=(name,))
    of = {node.kind: node for node in graph.nodes}
    asked = {
        "ZTurboImageDataset": {"folder": "folder of your pictures (in input)", "trigger": "trigger word"},
        "PrimitiveString": {"value": "name of the LoRA"},
        "ZTurboTrainLoRA": {
            "steps": "steps",
            "preview_prompts": "prompts of the previews ([trigger] is your word)",
            "zturbo_panel": "",
        },
        "ZTurboCompare": {"prompts": "prompts to draw before and after"},
    }
    for kind, labels in asked.items():
        of[kind].labels = {name: label for name, label in labels.items() if label}
    of["ZTurboSaveLoRA"].values["name"] = trainer.values["name"] = name["STRING"]
    inputs = [[of[kind].number, widget] for kind, labels in asked.items() for widget in labels]
    graph.extra = {"linearMode": True, "linearData": {"inputs": inputs, "outputs": [of["SaveImage"].number]}}


def train_on_my_pictures(graph: Graph) -> dict:
    """The blueprint: five things to fill in, and out comes turbo with the LoRA on it."""
    load = loader(graph)
    on, pictures, trainer, save = trained(graph, load, {}, {})
    lora = graph.add("LoraModelLoader", model=load["model"], lora=trainer["lora"])
    graph.lay_out(
        [("1. The model, and its adapter at +1", [[load], [on]]), ("2. Your pictures", [[pictures]])],
        [("3. Train", [[trainer]])],
        [("4. The LoRA", [[save, lora]])],
    )
    same = {"name": [save], "steps": [], "preview_prompts": []}
    asked = {pictures: {"folder": [], "trigger": []}, trainer: same}
    outputs = {"model": lora["model"], "clip": load["clip"], "vae": load["vae"], "lora": trainer["lora"]}
    return graph.to_subgraph(TITLES[graph.name], asked, {**outputs, "path": save["path"]})


def tiny_demo(graph: Graph):
    data = {"folder": "bundled: smiley", "trigger": "zsmile", "resolution": 128, "caption_dropout": 0.05}
    train = {
        "name": "smiley", "steps": 1000, "preview_prompts": "a large zsmile on a blue background",
        "learning_rate": 1e-3, "rank": 8, "alpha": 8.0, "batch_size": 4, "timesteps": "sigmoid", "keep_turbo": "guard",
        "preview_every": 100, "preview_width": 128, "preview_height": 128, "compute_dtype": "fp32",
        "gradient_checkpointing": False,
    }  # fmt: skip
    demo = tomllib.loads((TINY / "demo.toml").read_text(encoding="utf-8"))
    load = loader(graph, tiny=True)
    on, pictures, trainer, save = trained(graph, load, data, train, BUNDLED)
    gauge = graph.add("ZTurboHealthOptions", prompts="\n".join(demo["turbo"]["prompts"]))
    trainer.values["health_options"] = gauge["health_options"]
    grid, picture = compared(
        graph, load, "zturbo/smiley_before_after", lora=trainer["lora"], width=128, height=128,
        prompts="a large zsmile on a blue background\na large zsmile on a green background\n"
        "a large red square on a white background",
    )  # fmt: skip
    graph.lay_out(
        [
            ("1. The model, and its adapter at +1", [[load], [on]]),
            ("2. The pictures, and what turbo's gauge looks at", [[pictures], [gauge]]),
        ],
        [("3. Train", [[trainer]])],
        [("4. The LoRA, before and after", [[save, grid], [picture]])],
    )


def train_lora_minus_one(graph: Graph):
    load = loader(graph)
    on, pictures, trainer, save = trained(graph, load, {}, {"name": "my_lora_minus_one"})
    both = graph.add("LoraModelLoader", model=on["model"], lora=trainer["lora"])
    title = "De-Distill Adapter: take it away"
    off = graph.add("ZTurboDeDistillAdapter", title, model=both["model"], adapter=ADAPTER, direction="-1 restore")
    before = sampler(graph, load, load["model"], "Before: turbo as it came")
    after = sampler(graph, load, off["model"], "After: the same seed with the LoRA")
    side = graph.add("ImageStitch", "Before | after", image1=before["images"], image2=after["images"], spacing_width=4)
    picture = graph.add("SaveImage", images=side["IMAGE"], filename_prefix="zturbo/train_lora_minus_one")
    graph.lay_out(
        [("1. The model, and its adapter at +1", [[load], [on]]), ("2. Your pictures", [[pictures]])],
        [("3. Train", [[trainer]])],
        [("4. The LoRA on, the adapter off", [[save, both, off]])],
        [("5. Before and after", [[before, after], [side, picture]])],
    )


def train_lora_options(graph: Graph):
    load = loader(graph)
    on, pictures, trainer, save = trained(graph, load, {"validation": 0.1}, {"name": "my_lora_options"})
    options = {
        "network_options": graph.add("ZTurboNetworkOptions", targets="attention, feed_forward, adaln:8"),
        "optimizer_options": graph.add("ZTurboOptimizerOptions", schedule="cosine", warmup=50, ema=0.99),
        "loss_options": graph.add("ZTurboLossOptions"),
        "saving_options": graph.add("ZTurboSavingOptions", every=100, keep=3),
        "adapter_schedule": graph.add("ZTurboAdapterSchedule", end=0.9),
        "health_options": graph.add("ZTurboHealthOptions", prompts="\n".join(Turbo().prompts)),
    }
    trainer.values |= {name: node[name] for name, node in options.items()}
    after = graph.add("LoraModelLoader", model=load["model"], lora=trainer["lora"])
    pair = [
        sampler(graph, load, load["model"], "Before: turbo as it came"),
        sampler(graph, load, after["model"], "After: the same seed with the LoRA"),
    ]
    images = {f"image{n}": one["images"] for n, one in enumerate(pair, 1)}
    side = graph.add("ImageStitch", "Before | after", **images, spacing_width=4)
    picture = graph.add("SaveImage", images=side["IMAGE"], filename_prefix="zturbo/train_lora_options")
    some = list(options.values())
    graph.lay_out(
        [("1. The model, and its adapter at +1", [[load], [on]]), ("2. Your pictures", [[pictures]])],
        [("3. What may be set beside", [some[:3], some[3:]])],
        [("4. Train", [[trainer]])],
        [("5. The LoRA, before and after", [[save, after, *pair], [side, picture]])],
    )


def resume_or_extend(graph: Graph):
    trainer = training(
        graph, None, {"steps": 4000, "resume": "my_lora"}, loras="my_lora/newest", prefix="zturbo/extended"
    )
    trainer.title = "Train LoRA (Turbo): go on"


def compare_checkpoints(graph: Graph):
    load = loader(graph)
    grid, picture = compared(graph, load, "zturbo/compared", loras="my_lora/all", strengths="0.7, 1")
    graph.lay_out([("1. Turbo", [[load]])], [("2. Which, and how strong?", [[grid], [picture]])])


def sample_8_steps(graph: Graph):
    load = loader(graph)
    title = "Load your LoRA (bypassed: Ctrl-B turns it on)"
    lora = graph.add("LoraLoaderModelOnly", title, model=load["model"], lora_name="my_lora.safetensors")
    lora.mode = 4
    draw = sampler(graph, load, lora["MODEL"], "8 steps, CFG 1", FOX)
    picture = graph.add("SaveImage", images=draw["images"], filename_prefix="zturbo/sample")
    graph.lay_out([("1. Turbo, and your LoRA", [[load, lora]])], [("2. Draw", [[draw], [picture]])])


def health_report(graph: Graph):
    load = loader(graph)
    health = graph.add("ZTurboHealth", **parts(load), file="my_lora.safetensors")
    pictures = [
        graph.add("SaveImage", title, images=health[output], filename_prefix=f"zturbo/health_{output}")
        for title, output in (("By noise level", "plot"), ("Turbo above, with the LoRA below", "pictures"))
    ]
    graph.lay_out([("1. Turbo", [[load]])], [("2. How worn is it with the LoRA?", [[health], pictures])])


def make_adapter(graph: Graph):
    load = loader(graph)
    drawn = graph.add("ZTurboGenerateSet", **parts(load), name="adapter_set", prompts=words("set_prompts.txt"))
    pictures = graph.add("ZTurboImageDataset", folder=drawn["folder"], caption_dropout=0.0)
    train = {
        "name": "my_adapter", "steps": 10000, "preview_prompts": FOX, "learning_rate": 1e-5, "rank": 32, "alpha": 32.0,
        "timesteps": "sigmoid", "preview_every": 1000, "preview_seed": 42,
    }  # fmt: skip
    trainer = graph.add("ZTurboTrainLoRA", **train, **parts(load), dataset=pictures["dataset"])
    trainer.quiet = ["no_adapter"]  # here turbo is to wear off
    save = graph.add("ZTurboSaveLoRA", lora=trainer["lora"], name="my_adapter")
    check = graph.add("ZTurboCheckAdapter", **parts(load), lora=trainer["lora"])
    picture = graph.add("SaveImage", images=check["pictures"], filename_prefix="zturbo/adapter_check")
    graph.lay_out(
        [("1. Turbo draws a set", [[load, drawn]])],
        [("2. It is trained on", [[pictures], [trainer]])],
        [("3. Is the adapter done?", [[save, check], [picture]])],
    )


def extract_adapter(graph: Graph):
    load = loader(graph)
    undistilled = graph.add("UNETLoader", unet_name=UNDISTILLED)
    taken = graph.add(
        "ZTurboExtractAdapter", undistilled=undistilled["MODEL"], turbo=load["model"], name="extracted_adapter"
    )
    check = graph.add("ZTurboCheckAdapter", **parts(load), lora=taken["adapter"])
    picture = graph.add("SaveImage", images=check["pictures"], filename_prefix="zturbo/extracted_adapter")
    graph.lay_out(
        [("1. Turbo, and an undistilled model", [[load, undistilled]])],
        [("2. Their difference", [[taken]])],
        [("3. Is it an adapter?", [[check], [picture]])],
    )


def convert_lora(graph: Graph):
    load = loader(graph)
    made = graph.add("ZTurboConvertLoRA", file="my_lora.safetensors", model=load["model"])
    lora = graph.add("LoraModelLoader", model=load["model"], lora=made["lora"])
    draw = sampler(graph, load, lora["model"], "8 steps, CFG 1", FOX)
    picture = graph.add("SaveImage", images=draw["images"], filename_prefix="zturbo/converted")
    graph.lay_out(
        [("1. Turbo, and the other trainer's file", [[load, made]])],
        [("2. Draw with it", [[lora, draw], [picture]])],
    )


def adapter_plus_zero_minus(graph: Graph):
    load = loader(graph)
    on = graph.add("ZTurboDeDistillAdapter", "+1: de-distilled", model=load["model"], adapter=ADAPTER)
    title = "A model with the adapter merged in, by core"
    merged = graph.add("LoraLoaderModelOnly", title, model=load["model"], lora_name=ADAPTER)
    how = {"adapter": ADAPTER, "direction": "-1 restore", "checkpoint_has_adapter": True}
    off = graph.add("ZTurboDeDistillAdapter", "-1: turbo again", model=merged["MODEL"], **how)
    ways = (
        ("+1: blurred at 8 steps", on["model"], "plus_one"),
        ("0: turbo as it came", load["model"], "zero"),
        ("merged, then -1: turbo again", off["model"], "minus_one"),
    )
    draws = [sampler(graph, load, model, title, FOX) for title, model, _ in ways]
    draws[0].quiet = ["adapter_on"]  # it is what this one shows
    pictures = [
        graph.add("SaveImage", images=draw["images"], filename_prefix=f"zturbo/adapter_{way[2]}")
        for draw, way in zip(draws, ways)
    ]
    graph.lay_out(
        [("1. The model with the adapter on, without, and taken away", [[load, on, merged, off]])],
        [(f"2. {way[0]}", [[draw], [picture]]) for way, draw, picture in zip(ways, draws, pictures)],
    )


GRAPHS = {
    graph.__name__.replace("_app", ".app"): graph
    for graph in (
        tiny_demo, train_lora, train_lora_app, train_lora_12gb, train_lora_16gb, train_lora_minus_one,
        train_lora_options, resume_or_extend, compare_checkpoints, sample_8_steps, health_report, make_adapter,
        extract_adapter, convert_lora, adapter_plus_zero_minus,
    )
}  # fmt: skip
BLUEPRINTS = {"train_on_my_pictures": train_on_my_pictures}
TITLES = {"train_on_my_pictures": "Train on my pictures"}  # a blueprint's file is called as it is shown


def made(info: dict, name: str) -> str:
    """The file of a workflow, or of a blueprint."""
    graph = Graph(info, name)
    whole = GRAPHS[name](graph) if name in GRAPHS else BLUEPRINTS[name](graph)
    return json.dumps(whole or graph.to_json(), indent=2, ensure_ascii=False) + "\n"


def main(argv: list[str]):
    """argv: names of workflows; none: all."""
    with (
        tempfile.TemporaryDirectory() as base,
        dev.Server(dev.find_comfyui(None), Path(sys.executable), Path(base)) as server,
    ):
        info = server.get("/object_info")
    for name in argv or (*GRAPHS, *BLUEPRINTS):
        path = SUBGRAPHS / f"{TITLES[name]}.json" if name in BLUEPRINTS else WORKFLOWS / f"{name}.json"
        path.write_text(made(info, name), encoding="utf-8")
        log.info("%s", name)
