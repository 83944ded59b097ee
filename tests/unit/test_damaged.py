"""Damaged and odd inputs that once got a traceback or a wrong result, in plain cases. `bench fuzz` looks for more."""

import json
import os

import numpy as np
import pytest
import tomllib
import torch
from PIL import Image, ImageFile
from safetensors.torch import save, save_file

from zturbo import (
    buckets,
    checkpoint,
    convert,
    dataset,
    filenames,
    lorafile,
    lowrank,
    network,
    picturefile,
    recipefile,
    runfolder,
    runlog,
    words,
)
from zturbo.errors import LONGEST, CheckpointError, DatasetError, LoraFileError, ZTurboError
from zturbo.lorafile import module_targets
from zturbo.recipe import Network, Previews, Recipe
from zturbo.state import State

STEM = "layers.0.feed_forward.w1"


def test_a_sentence_is_one_printable_line_of_bearable_length():
    said = str(ZTurboError("a\nb\x1b[31m\u202e\ud800 é\xa0猫 " + "x" * 9000 + " What to do."))
    assert (
        said.startswith("a b\\x1b[31m\\u202e\\ud800 é 猫 x") and said.endswith("What to do.") and len(said) <= LONGEST
    )


# LoRA files


def halves(prefix="diffusion_model.", rank=2):
    return {f"{prefix}{STEM}.lora_A.weight": torch.ones(rank, 8), f"{prefix}{STEM}.lora_B.weight": torch.ones(8, rank)}


def of_rank_1(name: str, rows: int):
    stem = f"diffusion_model.layers.0.attention.{name}"
    return {f"{stem}.lora_A.weight": torch.ones(1, 4), f"{stem}.lora_B.weight": torch.ones(rows, 1)}


def lokr(**shapes):
    return {f"diffusion_model.{STEM}.{kind}": torch.ones(*shape) for kind, shape in shapes.items()}


@pytest.mark.parametrize(
    "state, said",
    [
        (halves() | {key: 2 * tensor for key, tensor in halves("transformer.").items()}, "twice, in two dialects"),
        (of_rank_1("qkv", 6) | of_rank_1("to_q", 2), "by itself and in the fused qkv"),
        (halves() | {f"diffusion_model.{STEM}.lora_A.weight": torch.ones(2, 8, dtype=torch.int8)},
            "holds torch.int8 numbers"),
        (halves() | {f"diffusion_model.{STEM}.lora_A.weight": torch.full((2, 8), float("nan"))}, "not finite"),
        (halves() | {f"diffusion_model.{STEM}.alpha": torch.tensor(float("inf"))}, "not finite"),
        (halves() | {f"diffusion_model.{STEM}.alpha": torch.ones([1] * 70)}, "has 70 dimensions"),
        (lokr(lokr_w1_a=(10**6, 1), lokr_w1_b=(1, 10**6), lokr_w2=(1, 1)), "larger than any model's matrix"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_lora(state, said):
    with pytest.raises(LoraFileError, match=said):
        lorafile.parse(state)


@pytest.mark.parametrize(
    "again",
    [
        halves("transformer."),
        {key: tensor.double() for key, tensor in halves("lora_unet__").items()},
        {f"{STEM}.alpha": torch.tensor(2)},
    ],
)
def test_the_same_numbers_twice_and_a_whole_number_for_alpha_are_read(again):
    factors, leftover = lorafile.parse(halves() | {f"diffusion_model.{STEM}.alpha": torch.tensor(2.0)} | again)
    assert not leftover and factors[STEM].delta().equal(torch.full((8, 8), 2.0))


def test_a_lora_that_the_format_cannot_hold_leaves_the_old_file(tmp_path):
    path = lorafile.write(tmp_path / "l.safetensors", halves(), {})
    before = path.read_bytes()
    with pytest.raises(LoraFileError, match="too large for torch.float16. Choose bf16"):
        lorafile.write(path, {"a": torch.tensor(1e6).to(torch.float16)}, {})
    assert path.read_bytes() == before


def test_metadata_that_is_null_and_fp8_numbers(tmp_path):
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in halves().items()}
    raw = save(state)
    head = raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip()[:-1] + b',"__metadata__":null}'
    (tmp_path / "l.safetensors").write_bytes(
        len(head).to_bytes(8, "little") + head + raw[8 + int.from_bytes(raw[:8], "little") :]
    )
    assert lorafile.read(tmp_path / "l.safetensors").metadata == {}
    assert (
        lorafile.parse(convert.convert(tmp_path / "l.safetensors", 0, "fp32").state)[0][STEM]
        .delta()
        .equal(torch.full((8, 8), 2.0))
    )


@pytest.mark.parametrize(
    "config",
    [
        '{"r": [' + "[" * 100_000,
        '{"rank_pattern": [1]}',
        '{"rank_pattern": {"(a+)+b": 4}}',
        '{"r": 0.0000001}',
        '{"r": 1' + "0" * 400 + "}",
    ],
)
def test_a_configuration_of_peft_that_is_none(tmp_path, config):
    save_file(halves("base_model.model."), tmp_path / "l.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(LoraFileError, match="The configuration of l.safetensors"):
        lorafile.read(tmp_path / "l.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are Unix's")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "l.safetensors")
    with pytest.raises(LoraFileError, match="is not a file"):
        lorafile.read(tmp_path / "l.safetensors")


# Pictures and captions


def folder(tmp_path, image=None, **files):
    if image is not None:
        image.save(tmp_path / "a.png")
    for name, content in files.items():
        (tmp_path / name.replace("_", ".")).write_bytes(content)
    return dataset.from_folder(tmp_path, (64,), "zvk")


BLACK = Image.new("RGB", (64, 64))


@pytest.mark.parametrize(
    "content, said",
    [
        # Pillow would start Ghostscript
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n", "a PostScript file"),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (50000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0",
            "cannot be read as a picture",
        ),
    ],
)
def test_other_formats_and_pictures_without_an_end(tmp_path, content, said):
    with pytest.raises(DatasetError, match=said):
        folder(tmp_path, a_png=content)


def test_a_cut_picture_is_refused_whatever_other_packs_told_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    BLACK.save(tmp_path / "b.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    with pytest.raises(DatasetError, match="1 of 2 pictures cannot be used. a.jpg cannot be read as a picture"):
        dataset.from_folder(tmp_path, (64,), "zvk")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_picture_too_large_for_the_memory_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(picturefile, "LARGEST", 64 * 63)
    with pytest.raises(DatasetError, match="64x64 pixels, more than 4,032"):
        folder(tmp_path, BLACK)


@pytest.mark.parametrize(
    "values, mode, seen", [(0.5, np.float32, 0.5), (128, np.float32, 0.5), (200, np.uint16, 0.003)]
)
def test_floats_from_0_to_1_and_dark_16_bits_look_as_they_are(tmp_path, values, mode, seen):
    Image.fromarray(np.full((64, 64), values, mode)).save(tmp_path / "a.tif")
    assert dataset.from_folder(tmp_path, (64,), "zvk").items[0].pixels().mean() == pytest.approx(seen, abs=0.005)


def test_floats_that_are_no_numbers(tmp_path):
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DatasetError, match="not finite"):
        dataset.from_folder(tmp_path, (64,), "zvk")


@pytest.mark.parametrize(
    "content, said", [("a cat".encode("utf-16-le"), "zeros in it"), (b"x" * (words.LONGEST + 1), "longer than")]
)
def test_captions_that_are_no_text(tmp_path, content, said):
    with pytest.raises(DatasetError, match=said):
        folder(tmp_path, BLACK, a_txt=content)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"file_name": "a.png", "text": "x", "caption_dropout": true}',
        b'{"file_name": "a.png", "text": "\\u0000"}',
        b'{"file_name": "a.png", "text": "\\ud83d"}',
    ],
)
def test_rows_that_are_none(tmp_path, line):
    with pytest.raises(DatasetError, match="Line 1|half a character"):
        folder(tmp_path, BLACK, metadata_jsonl=line)


def test_a_row_is_a_line_and_nothing_less(tmp_path):
    """U+2028 stands in JSON as it is."""
    row = json.dumps({"file_name": "a.png", "text": "a\u2028b"}, ensure_ascii=False).encode()
    assert folder(tmp_path, BLACK, metadata_jsonl=row).items[0].caption == "zvk, a\u2028b"


def test_half_an_emoji_in_the_trigger_word(tmp_path):
    BLACK.save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="half a character"):
        dataset.from_folder(tmp_path, (64,), "\ud83d")


@pytest.mark.parametrize(
    "read", [buckets.read_sides, lambda text: network.read_targets("*:" + text, 4), network.read_layers]
)
def test_numbers_of_thousands_of_digits(read):
    with pytest.raises(ZTurboError):
        read("9" * 5000)


# Recipes


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps = ", "not TOML"),
        ("x = " + "[" * 50_000, "not TOML"),
        ('steps = "3"', "steps is '3'; it must be a whole number"),
        ("steps = true", "steps is True; it must be a whole number"),
        ("steps = 2.0", "steps is 2.0; it must be a whole number"),
        ("steps = 99999999999999999999999", "at most 64 bits"),
        ("steps = 0x" + "f" * 6000, "at most 64 bits"),
        ("network = 3", r"network is 3; it must be a section, \[network\]"),
        ("[steps]\na = 1", "steps is {'a': 1}; it must be a whole number"),
        ("[network]\nrank = []", r"network.rank is \(\); it must be a whole number"),
        ("[loss]\nguidance = inf", "loss.guidance is inf"),
        ("[timesteps]\nmean = nan", "timesteps.mean is nan"),
        ("[data]\nflip = 1", "data.flip is 1; it must be true or false"),
        ("[previews]\nprompts = [3]", "previews.prompts is .*list of texts"),
        ("[previews]\nwidth = -5", "previews.width is -5"),
        ('name = "nul.txt"', "cannot be a file name"),
    ],
)
def test_toml_that_is_no_recipe(text, said):
    with pytest.raises(ZTurboError, match=said):
        recipefile.from_toml(text)


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ZTurboError, match="r.toml cannot be read as UTF-8"):
        recipefile.read(tmp_path / "r.toml")


def test_whole_numbers_are_numbers_and_every_character_is_toml():
    assert recipefile.from_toml("[network]\nalpha = 3").network.alpha == 3.0
    given = Recipe(previews=Previews(("a\x7fb\x00\t\u2028",)))
    assert tomllib.loads(recipefile.to_toml(given))["previews"]["prompts"] == ["a\x7fb\x00\t\u2028"]
    with pytest.raises(ZTurboError, match="half a character"):
        Recipe(previews=Previews(("\ud83d",)))


@pytest.mark.parametrize("name", ["CON", "nul", "com1.x", "LPT¹", "aux .b", "é" * 101, "𠀀" * 60])
def test_names_that_some_system_cannot_hold(name):
    assert not filenames.file_name(name)


def test_names_that_only_look_like_devices():
    assert all(map(filenames.file_name, ("console", "com", "com10", "my con", "nulls")))


# Runs


def state(rank=2):
    lora = network.create([module_targets(STEM, 8, 8)], Network(rank, rank), 0)
    return State(lora, torch.optim.AdamW(lowrank.parameters(lora)), losses=[1.0])


@pytest.mark.parametrize("losses", [torch.tensor(1.0).double(), torch.ones(1), torch.ones(1, 1).double()])
def test_losses_that_are_no_list_of_numbers_are_refused(tmp_path, losses):
    checkpoint.write(tmp_path / "c", state().copied())
    tensors, facts = checkpoint.read(tmp_path / "c")
    mine = state()
    with pytest.raises(CheckpointError, match="no such numbers"):
        mine.take(tensors | {"losses": losses}, facts)
    assert mine.losses == [1.0]


def test_an_optimizers_numbers_that_no_checkpoint_can_hold_are_refused(tmp_path):
    moved = state()
    for parameter in lowrank.parameters(moved.lora):
        parameter.grad = torch.ones_like(parameter)
    moved.optimizer.step()
    checkpoint.write(tmp_path / "c", moved.copied())
    tensors, facts = checkpoint.read(tmp_path / "c")
    key = next(key for key in tensors if key.endswith(".step"))
    with pytest.raises(CheckpointError, match="another optimizer .*complex64"):
        state().take(tensors | {key: tensors[key].to(torch.complex64)}, facts)


@pytest.mark.parametrize(
    "facts",
    [
        {"seconds": "x"},
        {"seconds": "nan"},
        {"setbacks": "-1"},
        {"optimizer": "3"},
        {"optimizer": "[" * 100_000},
        {"optimizer": '{"dict": [["state", {"dict": []}], ["param_groups", {"list": [], "tuple": false}]]}'},
    ],
)
def test_a_refused_checkpoint_leaves_no_trace(tmp_path, facts):
    checkpoint.write(tmp_path / "c", state().copied())
    tensors, good = checkpoint.read(tmp_path / "c")
    for tensor in tensors.values():
        tensor += 1
    mine = state()
    with pytest.raises(CheckpointError):
        mine.take(tensors, good | facts)
    assert mine.losses == [1.0] and all(
        torch.equal(a, b) for a, b in zip(mine.parts().values(), state().parts().values())
    )


def test_a_checkpoint_without_facts(tmp_path):
    save_file({"losses": torch.ones(1)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        checkpoint.read(tmp_path / "c")


def test_strangers_among_the_checkpoints(tmp_path):
    run = runfolder.RunFolder.new(tmp_path, Recipe("run"))
    for name in ("step_x", "step_", "step_²", "step_999999", "step_1000000"):
        (run.checkpoints / f"{name}.safetensors").touch()
    (run.checkpoints / "step_2000000.safetensors").mkdir()
    assert [path.stem for path in run.checkpoint_files()] == ["step_1000000", "step_999999"]
    run.forget_checkpoints(999999)
    assert [path.stem for path in run.checkpoint_files()] == ["step_999999"]


def test_lines_of_a_log_that_are_none(tmp_path):
    run = runfolder.RunFolder.new(tmp_path, Recipe("run"))
    good = [
        {"event": "start", "total": 5},
        {"step": 1, "loss": 0.5, "seconds": 1.0, "grad_norm": float("inf")},
        {"event": "note", "text": "ä"},
        {"event": "end", "how": "failed", "saved": 1},
    ]
    bad = [
        b"3",
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"loss": 1}',
        b'{"step": "2", "loss": 1, "seconds": 1}',
        b'{"step": 2, "loss": NaN, "seconds": 1}',
        b'{"event": "note"}',
        b'{"event": []}',
        b'{"event": "end"}',
    ]
    lines = [
        line
        for event, *broken in zip(good, bad[0::3], bad[1::3], bad[2::3])
        for line in (*broken, json.dumps(event).encode())
    ]
    run.events.write_bytes(b"\n".join([*lines, *bad]))
    assert runlog.read_events(run.events)[:3] == good[:3]
    assert runlog.summary(run.path, 10)["steps"] == [{"step": 1, "loss": 0.5, "seconds": 1.0}] and runlog.how_ended(
        run.path
    ) in (None, "failed")
    run.rewind(1)
