"""Folders, names and links as people have them, through the nodes of a real server.

What each kind of file becomes is in unit/test_folder.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from safetensors import safe_open

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import model_files
import prompts
from test_server import failure, newest_run

from bench import gpu_files
from zturbo import picturefile


def picture(path: Path, color="red", size=(64, 48), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def report(server, **options) -> str:
    """What Image Dataset says of a folder."""
    outputs = server.run({"data": prompts.dataset(**options), "see": prompts.node("PreviewAny", source=["data", 1])})
    return outputs["see"]["text"][0].replace("\\", "/")


def taught(server, name: str, dataset: dict, **more) -> tuple[dict, Path]:
    """(caption -> pictures that have it, as the LoRA of two steps says; run folder)."""
    server.run({**prompts.training(name=name, steps=2, batch_size=1, preview_prompts="", **more), "dataset": dataset})
    run = newest_run(server, name)
    with safe_open(run / "lora.safetensors", "pt") as file:
        (tags,) = json.loads(file.metadata()["ss_tag_frequency"]).values()
    return tags, run


def heic(path: Path, kind: str):
    assert picturefile.can_read(kind)
    return picture(path, format=kind)


ROWS = {  # what lies in the folder -> (trigger word, how the report begins)
    "a workflow of 3 MB in a PNG": (lambda home: picture(home / "a.png", pnginfo=workflow()), "zvk", "1 picture,"),
    "a-masklabel.png": (
        lambda home: [picture(home / name) for name in ("a.png", "a-masklabel.png")],
        "zvk",
        "1 picture, 1 an epoch. Buckets: 64x48: 1.\n1 masked.",
    ),
    "a.MASK.PNG": (
        lambda home: [picture(home / name) for name in ("a.png", "a.MASK.PNG")],
        "zvk",
        "1 picture, 1 an epoch. Buckets: 64x48: 1.\n1 masked.",
    ),
    "IMG_1.TXT": (lambda home: picture(home / "IMG_1.JPG").with_name("IMG_1.TXT").write_text("x"), "", "1 picture,"),
    "@eaDir": (lambda home: [picture(home / name) for name in ("a.png", "@eaDir/a.png")], "zvk", "1 picture,"),
    "__MACOSX": (lambda home: [picture(home / name) for name in ("a.png", "__MACOSX/a.png")], "zvk", "1 picture,"),
    "AVIF": (lambda home: picture(home / "a.avif"), "zvk", "1 picture,"),
    "AVIF called jpg": (lambda home: picture(home / "a.jpg", format="AVIF"), "zvk", "1 picture,"),
    "HEIC": (lambda home: heic(home / "a.heic", "HEIF"), "zvk", "1 picture,"),
    "HEIC called jpg": (lambda home: heic(home / "a.jpg", "HEIF"), "zvk", "1 picture,"),
    "JPEG XL": (lambda home: heic(home / "a.jxl", "JXL"), "zvk", "1 picture,"),
    "a caption in UTF-16": (
        lambda home: picture(home / "a.png").with_suffix(".txt").write_bytes("x".encode("utf-16")),
        "",
        "1 picture,",
    ),
    "a caption in cp1252": (
        lambda home: picture(home / "a.png").with_suffix(".txt").write_bytes("café".encode("cp1252")),
        "",
        "1 picture,",
    ),
    "a linked sub-folder": (
        lambda home: (home / "sub").symlink_to(
            picture(home.parent.parent / "drive2" / "a.png").parent, target_is_directory=True
        ),
        "zvk",
        "1 picture,",
    ),
    "a snapshot of links": (
        lambda home: (home / "a.png").symlink_to(picture(home.parent.parent / "blobs2" / "0123", format="PNG")),
        "zvk",
        "1 picture,",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_by_itself(server, row):
    lay, trigger, begins = ROWS[row]
    home = server.base / "input" / f"row {list(ROWS).index(row)}"
    home.mkdir()
    lay(home)
    assert report(server, folder=home.name, trigger=trigger, resolution=64).startswith(begins)


def test_the_number_of_the_folder_itself_and_a_blank_trigger_word(server):
    picture(server.base / "input" / "2024_alone" / "a.png")
    assert report(server, folder="2024_alone", trigger="zvk", resolution=64).startswith("1 picture, 1 an epoch.")
    picture(server.base / "input" / "blank" / "a.png")
    assert "no caption" in failure(
        server, {"data": prompts.dataset("blank", " ", 64), "see": prompts.node("PreviewAny", source=["data", 1])}
    )


def workflow() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", json.dumps({"nodes": "x" * 3_000_000}), zip=True)
    return info


@pytest.fixture(scope="module")
def holiday(server) -> str:
    """A folder of everything: its name in input/."""
    home = server.base / "input" / "2024_holiday"
    picture(home / "comfy.png", "red", pnginfo=workflow())
    picture(home / "IMG_1.JPG", "green").with_name("IMG_1.TXT").write_text("in capitals")
    picture(home / "a.png", "blue").with_suffix(".txt").write_bytes("sixteen bits".encode("utf-16"))
    picture(home / "a-masklabel.png", "white")
    picture(home / "b.png", "gray").with_suffix(".txt").write_bytes("au café".encode("cp1252"))
    picture(home / "b.MASK.PNG", "white")
    picture(home / "c.jpg", "yellow", format="AVIF")
    picture(home / "3_trip" / "d.png", "black").with_suffix(".txt").write_text("three times")
    for name in ("@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png"):
        picture(home / name)
    picture(server.base / "drive" / "e.png", "pink").with_suffix(".txt").write_text("on another drive")
    (home / "linked").symlink_to(server.base / "drive", target_is_directory=True)
    (home / "f.png").symlink_to(picture(server.base / "blobs" / "0123abc", "white", format="PNG"))
    return home.name


def test_a_folder_of_everything(server, holiday):
    said = report(server, folder=holiday, trigger="zvk", resolution=64)
    assert said.startswith("8 pictures, 10 an epoch.") and "2 masked." in said
    for line in (
        "3 folders are hidden or a system's own and are left out: .ipynb_checkpoints, @eaDir, __MACOSX.",
        "The number in the name of the folder itself (2024_holiday) does not count: repeats are those of sub-folders",
        "1 texts are no UTF-8 and were read as Windows-1252: b.txt.",
    ):
        assert line in said


def test_its_captions_masks_and_repeats_are_what_is_trained(server, holiday):
    tags, run = taught(server, "holiday", prompts.dataset(holiday, " zvk \n", 64))
    assert tags == {
        "zvk": 8,
        "in capitals": 1,
        "sixteen bits": 1,
        "au café": 1,
        "three times": 1,
        "on another drive": 1,
    }
    assert 'trigger = "zvk"' in (run / "recipe.toml").read_text(encoding="utf-8")


def test_a_number_that_is_a_year_is_doubted_before_the_run(server):
    for name in ("a", "b"):
        picture(server.base / "input" / "years" / "2024_trip" / f"{name}.png", "red")
    assert "The folder 2024_trip shows each of its pictures 2,024 times an epoch." in report(
        server, folder="years", trigger="zvk", resolution=64
    )
    _, run = taught(server, "years", prompts.dataset("years", "zvk", 64))
    notes = [
        event["text"]
        for event in map(json.loads, (run / "events.jsonl").read_text().splitlines())
        if event.get("event") == "note"
    ]
    assert any("2,024 times an epoch" in note for note in notes)


@pytest.mark.parametrize(
    "name", ["my cats", "linked cats", '"my cats"', "input/my cats", "my cats\\deep", "my cats/", "/ABSOLUTE"]
)
def test_folders_as_people_paste_them(server, name):
    picture(server.base / "input" / "my cats" / "deep" / "a.png")
    picture(server.base / "elsewhere" / "a.png")
    if not (server.base / "input" / "linked cats").is_symlink():
        (server.base / "input" / "linked cats").symlink_to(server.base / "elsewhere", target_is_directory=True)
    name = name.replace("/ABSOLUTE", str(server.base / "input" / "my cats"))
    assert report(server, folder=name, trigger="zvk", resolution=64).startswith("1 picture, 1 an epoch.")


@pytest.mark.parametrize(
    "name", ["../elsewhere", "ABSOLUTE", "..\\elsewhere", "my cats/../../elsewhere", "linked cats/../../elsewhere"]
)
def test_names_that_lead_out_stay_refused(server, name):
    picture(server.base / "elsewhere" / "a.png")
    name = name.replace("ABSOLUTE", str(server.base / "elsewhere"))
    said = failure(
        server, {"data": prompts.dataset(name, "zvk", 64), "see": prompts.node("PreviewAny", source=["data", 1])}
    )
    assert "is not inside ComfyUI's input or output folder" in said or (
        os.name != "nt" and "\\" in name and "does not exist" in said
    )


def test_a_lora_is_saved_into_a_linked_sub_folder_and_drawn_with(server):
    (server.base / "big" / "loras").mkdir(parents=True)
    (server.base / "models" / "loras" / "big").symlink_to(server.base / "big" / "loras", target_is_directory=True)
    graph = prompts.training(name="linked", steps=2, preview_prompts="")
    server.run(
        {
            **graph,
            "save": prompts.node("ZTurboSaveLoRA", lora=["train", 0], name="big/mine", dtype="bf16", overwrite=False),
        }
    )
    assert (server.base / "big" / "loras" / "mine.safetensors").is_file()
    mine = {"lora_name": "big/mine.safetensors", "strength_model": 1.0}
    server.run(
        {
            "load": prompts.load(),
            "lora": prompts.node("LoraLoaderModelOnly", model=["load", 0], **mine),
            "draw": prompts.sample(["lora", 0], steps=1),
            "save": prompts.save_image(["draw", 0]),
        }
    )
    # core runs what is well in it
    server.wait(
        server.queue(
            {
                **graph,
                "save": prompts.node(
                    "ZTurboSaveLoRA", lora=["train", 0], name="../mine", dtype="bf16", overwrite=False
                ),
            }
        )
    )
    assert not (server.base / "models" / "mine.safetensors").exists()


def test_pictures_of_cores_own_loader_are_one_dataset(server):
    """Lists of pictures of several sizes and of texts of several lines."""
    home = server.base / "input" / "listed"
    for name, size in {"a": (64, 48), "b": (48, 64), "c": (64, 64)}.items():
        picture(home / f"{name}.png", "red", size).with_suffix(".txt").write_text(f"first of {name}\nsecond line")
    core = prompts.node("LoadImageTextDataSetFromFolder", folder="listed")
    data = prompts.dataset("", "zvk", 64)
    data["inputs"] |= {"images": ["core", 0], "captions": ["core", 1]}
    before = set((server.base / "output" / "zturbo").glob("listed*"))
    server.run({**prompts.training(name="listed", steps=2, preview_prompts=""), "core": core, "dataset": data})
    (run,) = set((server.base / "output" / "zturbo").glob("listed*")) - before
    with safe_open(run / "lora.safetensors", "pt") as file:
        (tags,) = json.loads(file.metadata()["ss_tag_frequency"]).values()
        assert file.metadata()["ss_num_train_images"] == "3"
    assert {tag for tag in tags if "second line" in tag} == {f"first of {name}\nsecond line" for name in "abc"}


def test_a_trigger_word_in_preview_prompts_and_what_is_drawn_as_words(server):
    server.run(prompts.training(name="flags", steps=1, preview_prompts="a [Trigger] --w 832"))
    run = newest_run(server, "flags")
    assert "a zsmile --w 832" in (run / "recipe.toml").read_text(encoding="utf-8")
    assert any(
        "has --w in it, which is drawn as words" in line for line in (run / "events.jsonl").read_text().splitlines()
    )


def test_parts_in_sub_folders_are_found(server):
    """auto looks for the usual names wherever they lie.

    That this one is no text encoder is said of the file that was found.
    """
    model, parts = (
        server.base / "models" / "diffusion_models" / "z_image_turbo_bf16.safetensors",
        ("text_encoders/z-image/qwen_3_4b.safetensors", "vae/flux/ae.safetensors"),
    )
    made = [model_files.write(model, model_files.holes(gpu_files.on_meta().diffusion_model, "BF16"))]
    for name in parts:
        made.append(server.base / "models" / name)
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        made[-1].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    try:
        load = prompts.node("ZTurboLoadModel", diffusion_model=model.name, text_encoder="auto", vae="auto")
        said = failure(
            server, {"load": load, "draw": prompts.sample(["load", 0]), "save": prompts.save_image(["draw", 0])}
        )
    finally:  # the server is others' too
        for path in made:
            path.unlink()
    assert "qwen_3_4b.safetensors is a Git LFS pointer" in said
