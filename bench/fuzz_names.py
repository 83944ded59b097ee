"""Names and links that lead out of ComfyUI's folders. Kinds for `bench fuzz`."""

import os
import random
from pathlib import Path

import torch

from bench.fuzz_checkpoints import go_on, run_with, whole_checkpoint
from bench.fuzz_pictures import encoded, folder, trained
from bench.fuzz_watch import Damaged, Place, inside
from zturbo import dataset, lorafile, runfolder, runlog, runs
from zturbo.errors import ZTurboError
from zturbo.hosts import comfy_paths
from zturbo.recipe import Recipe
from zturbo.runfolder import RunFolder

DEVICES = ("CON", "con", "NUL", "nul.txt", "COM1", "com1.x", "LPT9", "AUX", "PRN.", "COM¹", "CONIN$", "aux .b")
TRICKS = (
    "..", "../x", "../../etc/passwd", "/etc/passwd", "a/../../x", "a/./b", "./a", "a//b", "/", "//server/share/x",
    "\\\\server\\share\\x", "C:\\x", "C:x", "C:/x", "..\\x", "a\\b", "~", "~/x", "$HOME", "%TEMP%", "",
    " ", ".", "...", "a.", "a ", " a", ".hidden", "a\x00b", "\x00", "a\nb", "a\tb", "x" * 101, "x" * 300, "x" * 5000,
    "é" * 100, "𠀀" * 100, "a/" * 3000, "/".join("d" * 40), "a:b", "a|b", "a?b", "a*b", "<a>", '"a"', "-rf",
    "a\u202egnp.exe", "\u2025/x", "a\u2044b", "a\uff0fb", "\uff0e\uff0e/x", "a\u200db", "\ud800", "a\udcff", "ａ", "²",
    "my_²", "a_", "a_2", "a_999999999999999999999", "file:///etc/passwd", "http://localhost/x", "input",
    "../input_old", "../outside", "../secret.txt", "../outside/run", "../models/loras2", "outside/run",
    "../../secret", "bundled: smiley", "/proc/self", "/dev/stdin", "/dev/shm", *DEVICES,
)  # fmt: skip


def everywhere(name: str) -> bool:
    """Can every system hold a file of this name? Written out apart from the pack's own rule."""
    stem = name.split(".")[0].strip().upper()
    return (
        stem not in {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")}
        and len(name.encode()) + 25 <= 255
        and name[-1] not in ". "
        and not set(name) & set('<>:"/\\|?*')
    )


def trick(rng: random.Random) -> str:
    """One of TRICKS, or two of them together."""
    if rng.random() < 0.6:
        return rng.choice(TRICKS)
    return rng.choice(TRICKS) + rng.choice(("/", "", "_", "/../", "\\")) + rng.choice(TRICKS)


def names(rng: random.Random, place: Place) -> Damaged:
    """A name in a widget that wants to be a path elsewhere."""
    name, use = trick(rng), rng.choice(USES)
    for path in (place.input / "input", place.runs / "a_2" / "checkpoints", place.runs / "my_²", place.loras / "a"):
        path.mkdir(parents=True)
    (place.runs / "a_2" / "checkpoints" / "step_000001.safetensors").write_bytes(whole_checkpoint(1))
    return Damaged(f"{use.__name__} {name[:80]!r}", lambda: use(name, place))


def use_dataset(name: str, place: Place):
    comfy_paths.folder_fingerprint(name)
    found = comfy_paths.dataset_folder(name)
    bundled = name.strip() == comfy_paths.BUNDLED
    assert bundled or inside(os.path.realpath(found), tuple(map(str, place.allowed))), f"{found} is outside"
    assert dataset.from_folder(found, (64,), "zvk").items


def use_run(name: str, place: Place):
    """As the panel's routes do with a name from the browser."""
    for found in (comfy_paths.runs().folder(name), *comfy_paths.runs().named(name)):
        if found is not None:
            assert found.parent == place.runs, f"{found} is outside"
            runlog.summary(found, 10)
            runfolder.request(found, runfolder.STOP)
            runfolder.request(found, runfolder.SAVE)


def use_checkpoint(name: str, place: Place):
    for given in (name, f"a_2/{name}"):
        try:
            found = comfy_paths.runs().checkpoint(given)
        except ZTurboError:
            continue
        assert found.parent == place.runs / "a_2" / "checkpoints" and found.is_file(), f"{found}"
    comfy_paths.runs().checkpoint(name)


def use_new_run(name: str, place: Place):
    for _ in range(2):
        run = RunFolder.new(comfy_paths.runs().root, Recipe(name=name))
        assert run.path.parent == place.runs and everywhere(run.path.name), run.path.name
    assert run.path in comfy_paths.runs().named(name)


def use_lora(name: str, place: Place):
    state = {"diffusion_model.layers.0.feed_forward.w1.lora_A.weight": torch.ones(1, 2)}
    for overwrite in (False, False, True):
        path = lorafile.write(comfy_paths.lora_path(name, overwrite), state, {})
        assert (
            path.is_file()
            and inside(os.path.realpath(path), (str(place.loras), str(place.drive)))
            and all(everywhere(part) for part in path.relative_to(place.loras).parts)
        ), str(path)


def use_lora_file(name: str, place: Place):
    assert inside(os.path.realpath(comfy_paths.lora_file(name)), (str(place.loras),))


USES = (use_dataset, use_run, use_checkpoint, use_new_run, use_lora, use_lora_file)


# Links


def link(path: Path, to: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def links_in_pictures(rng: random.Random, place: Place) -> Damaged:
    """A folder of pictures with a link in it.

    It is the owner's, which is followed, or one that leads nowhere, in a circle or to a device.
    """
    drive, mine = place.drive / "pictures", place.input / "set"
    drive.mkdir(exist_ok=True)
    (drive / "d.png").write_bytes(encoded("PNG"))
    (drive / "d.txt").write_text("a thing of the drive", encoding="utf-8")
    cases = {
        "folder": ("", drive, {"d.png"}), "sub-folder": ("more", drive, {"a.png", "more/d.png"}),
        "picture": ("b.png", drive / "d.png", {"a.png", "b.png"}), "caption": ("a.txt", drive / "d.txt", {"a.png"}),
        "loop": ("", mine, set()), "loop below": ("more", mine, {"a.png"}),
        "loop above": ("more", place.input, {"a.png"}), "mask": ("a.mask.png", drive / "d.png", {"a.png"}),
        "no rows": ("metadata.jsonl", drive / "d.txt", set()), "to a device": ("b.png", Path("/dev/zero"), {"a.png"}),
        "caption from a device": ("a.caption", Path("/dev/zero"), {"a.png"}),
        "dangling": ("b.png", drive / "gone.png", {"a.png"}), "to itself": ("b.png", mine / "b.png", {"a.png"}),
        "within": ("b.png", mine / "a.png", {"a.png", "b.png"}),
    }  # fmt: skip
    what = rng.choice(list(cases))
    name, to, seen = cases[what]
    if name:
        folder(place, "a.png", encoded("PNG"), None)
    link(mine / name, to)

    def feed():
        comfy_paths.folder_fingerprint("set")
        found = trained(place)
        assert {Path(item.name).as_posix() for item in found.items} == seen, sorted(item.name for item in found.items)
        assert ("of the drive" in found.items[0].caption) == (what in ("folder", "caption"))

    return Damaged(what, feed)


def links_in_runs(rng: random.Random, place: Place) -> Damaged:
    """A run folder, as someone else may have packed it, with a link in it."""
    run = run_with(place, whole_checkpoint(2))
    outside = place.outside / "run"
    what = rng.choice(
        (
            "checkpoints",
            "checkpoint",
            "events.jsonl",
            "recipe.toml",
            "stop",
            "save",
            "previews",
            "lora.safetensors",
            "lora.safetensors.part",
            "recipe.toml.part",
            "events.jsonl.part",
        )
    )
    if what in ("checkpoints", "previews"):
        (run.path / what).rename(run.path / (what + "_old"))
        link(run.path / what, outside / what)
    elif what == "checkpoint":
        link(run.checkpoints / "step_000003.safetensors", outside / "events.jsonl")
    else:
        link(run.path / what, outside / rng.choice(("events.jsonl", "new")))

    def feed():
        for found in (comfy_paths.runs().folder("run"), *comfy_paths.runs().named("run")):
            if found is not None:
                work_in(RunFolder(found))
        comfy_paths.runs().checkpoint("run")

    return Damaged(what, feed)


def work_in(run: RunFolder):
    """What the trainer and the panel do with a run folder."""
    runlog.summary(run.path, 10)
    runs.name_of(run.path)
    run.keep_recipe(Recipe("run"))
    go_on(run)
    run.event(event="note", text="x")
    run.rewind(1)
    run.save_lora(1, {"a": torch.ones(1)}, {})
    runfolder.request(run.path, runfolder.STOP)
    runfolder.request(run.path, runfolder.SAVE)
    run.preview(1, 0, torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())


def links_in_loras(rng: random.Random, place: Place) -> Damaged:
    """A link in models/loras where a LoRA is to be saved: a folder's is followed, a file's is replaced."""
    what = rng.choice(("sub-folder", "deeper", "file", "dangling file", "part", "loop"))
    name = {"sub-folder": "sub/x", "deeper": "sub/more/x", "loop": "sub/x"}.get(what, "x")
    to = {
        "sub-folder": place.drive,
        "deeper": place.drive,
        "loop": place.loras / "sub",
        "dangling file": place.outside / "new",
    }.get(what, place.outside / "secret.txt")
    link(
        place.loras
        / {"part": "x.safetensors.part", "file": "x.safetensors", "dangling file": "x.safetensors"}.get(what, "sub"),
        to,
    )
    return Damaged(what, lambda: use_lora(name, place))


KINDS = [names, names, names, links_in_pictures, links_in_runs, links_in_loras]
