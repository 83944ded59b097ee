"""Dialects in, one dialect out, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from zturbo import convert, lorafile, loranames
from zturbo.errors import LoraFileError
from zturbo.lowrank import Factors

NAME = "layers.3.attention.to_q"


def pair(rank=2, inside=8, out=8):
    return torch.randn(rank, inside), torch.randn(out, rank)


DIALECTS = {
    "ecosystem": ("diffusion_model.layers.3.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": ("transformer.layers.3.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
    "peft": ("base_model.model.layers.3.attention.to_q", ".lora_A.default.weight", ".lora_B.default.weight"),
    "kohya": ("lora_unet_layers_3_attention_to_q", ".lora_down.weight", ".lora_up.weight"),
    "lycoris": ("lycoris_layers_3_attention_to_q", ".lora_down.weight", ".lora_up.weight"),
    "two underscores": ("lora_unet__layers_3_attention_to_q", ".lora_down.weight", ".lora_up.weight"),
    "a way in the name": (
        "lora_unet_model_diffusion_model_layers_3_attention_to_q",
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "onetrainer": ("lora_transformer__layers_3_attention_to_q", ".lora_down.weight", ".lora_up.weight"),
    "compiled": ("_orig_mod.layers.3._orig_mod.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
    "compiled, flat": ("lora_unet__orig_mod_layers_3__orig_mod_attention_to_q", ".lora_down.weight", ".lora_up.weight"),
    "several cards": ("module.transformer.layers.3.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
    "an adapter's name": (
        "base_model.model.layers.3.attention.to_q",
        ".lora_A.my_adapter.weight",
        ".lora_B.my_adapter.weight",
    ),
    "a number for a name": (
        "transformer.layers.3.attention.to_q",
        ".lora_A.default_0.weight",
        ".lora_B.default_0.weight",
    ),
    "old peft": ("unet.base_model.model.layers.3.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
    "mochi": ("dit.layers.3.attention.to_q", ".lora_A", ".lora_B"),
    "old diffusers": ("net.layers.3.attention.to_q", "_lora.down.weight", "_lora.up.weight"),
    "linear layer": ("unet.layers.3.attention.to_q", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "bare": ("layers.3.attention.to_q", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_reads_to_the_same_lora(dialect, tmp_path):
    stem, down, up = DIALECTS[dialect]
    A, B = pair()
    save_file({stem + down: A, stem + up: B, stem + ".alpha": torch.tensor(1.0)}, tmp_path / "l.safetensors")
    file = lorafile.read(tmp_path / "l.safetensors")
    assert list(file.factors) == [NAME] and not file.leftover
    assert torch.equal(file.factors[NAME].A, A) and torch.equal(file.factors[NAME].B, B)
    assert file.factors[NAME].scale == 0.5  # alpha 1 at rank 2
    assert file.ranks == [2] and file.dtypes == ["float32"]


@pytest.mark.parametrize(
    "stem",
    [
        "control_layers.3.attention.to_q",
        "lora_unet_control_layers_3_attention_to_q",
        "text_encoder.layers.3.attention.to_q",
        "lora_te_layers_3_self_attn_q_proj",
        "vae.layers.3.attention.to_q",
        "layers.x.attention.to_q",
    ],
)
def test_what_only_looks_like_a_layer_is_none(stem):
    assert loranames.canonical(stem) is None


def test_fused_qkv_is_three_loras_of_the_same_dense_difference():
    A, B = torch.randn(2, 8), torch.randn(24, 2)
    factors, leftover = lorafile.parse(
        {
            "diffusion_model.layers.0.attention.qkv.lora_A.weight": A,
            "diffusion_model.layers.0.attention.qkv.lora_B.weight": B,
        }
    )
    dense = torch.cat([factors[f"layers.0.attention.to_{letter}"].delta() for letter in "qkv"])
    assert not leftover and torch.allclose(dense, B @ A)


def test_round_trip_is_exact_and_names_are_the_ecosystems(tmp_path):
    A, B = pair()
    state = lorafile.state_dict(
        {"layers.0.attention.to_out.0": Factors(A, B, 1.0), NAME: Factors(A, B, 0.25)}, torch.float32
    )
    assert sorted(state) == [
        "diffusion_model.layers.0.attention.to_out.0.lora_A.weight",
        "diffusion_model.layers.0.attention.to_out.0.lora_B.weight",
        "diffusion_model.layers.3.attention.to_q.alpha",
        "diffusion_model.layers.3.attention.to_q.lora_A.weight",
        "diffusion_model.layers.3.attention.to_q.lora_B.weight",
    ]
    path = lorafile.write(tmp_path / "deep" / "l.safetensors", state, {"zturbo.recipe": "x"})
    again = lorafile.read(path)
    assert torch.equal(again.factors[NAME].B, B) and again.factors[NAME].scale == 0.25
    assert again.metadata["zturbo.recipe"] == "x" and again.metadata["format"] == "pt"
    assert [p.name for p in path.parent.iterdir()] == ["l.safetensors"]


def test_a_cut_off_file_gets_a_sentence(tmp_path):
    whole = tmp_path / "l.safetensors"
    save_file({"diffusion_model.layers.0.feed_forward.w1.lora_A.weight": torch.randn(4, 400)}, whole)
    data = whole.read_bytes()
    for size, sentence in (
        (0, "is empty"),
        (4, "cannot be read: it is cut off within its header"),
        (40, "cut off within its header"),
        (len(data) // 2, "is cut off: it has"),
        (len(data) - 1, "is cut off: it has"),
    ):
        whole.write_bytes(data[:size])
        with pytest.raises(LoraFileError, match=f"l.safetensors .*{sentence}"):
            lorafile.read(whole)
    whole.write_bytes(data + b"more")
    with pytest.raises(LoraFileError, match="l.safetensors is not a whole safetensors file"):
        lorafile.read(whole)


def test_half_a_pair_and_wrong_shapes_and_strangers_are_named(tmp_path):
    A, B = pair()
    with pytest.raises(LoraFileError, match="only lora_A.weight of layers.3.attention.to_q: lora_B.weight is missing"):
        lorafile.parse({f"diffusion_model.{NAME}.lora_A.weight": A})
    with pytest.raises(LoraFileError, match="do not fit each other"):
        lorafile.parse({f"diffusion_model.{NAME}.lora_A.weight": A, f"diffusion_model.{NAME}.lora_B.weight": B[:, :1]})
    save_file({"lora_unet_down_blocks_0.lora_down.weight": A}, tmp_path / "sd.safetensors")
    with pytest.raises(LoraFileError, match="holds no LoRA for Z-Image"):
        lorafile.read(tmp_path / "sd.safetensors")


def test_a_lora_that_fits_only_partly_is_refused_with_counts():
    targets = [lorafile.module_targets("layers.3.attention.qkv", 8, 24)]
    A, B = pair()
    lorafile.check_fit({NAME: Factors(A, B)}, targets, "good")
    with pytest.raises(LoraFileError, match="1 of its 2 matrices do.*1 have no place.*layers.9"):
        lorafile.check_fit({NAME: Factors(A, B), "layers.9.attention.to_q": Factors(A, B)}, targets, "bad")
    with pytest.raises(LoraFileError, match="another size.*16 in, 8 out; the model has 8 in, 8 out"):
        lorafile.check_fit({NAME: Factors(*pair(inside=16))}, targets, "bad")


def test_a_folder_that_cannot_be_written_costs_nothing_and_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LoraFileError, match="cannot be written"):
        lorafile.write(tmp_path / "file" / "l.safetensors", {}, {})


def test_an_old_file_survives_a_write_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "l.safetensors"
    lorafile.write(path, {"a": torch.zeros(1)}, {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LoraFileError, match="No space left"):
        lorafile.write(path, {"a": torch.ones(1)}, {})
    assert load_file(path)["a"].item() == 0 and [p.name for p in tmp_path.iterdir()] == ["l.safetensors"]


# Files as trainers, resizers and bundlers leave them


def whole(**more) -> dict[str, torch.Tensor]:
    A, B = pair()
    return {
        "diffusion_model.layers.3.attention.to_q.lora_A.weight": A,
        "diffusion_model.layers.3.attention.to_q.lora_B.weight": B,
        **more,
    }


@pytest.mark.parametrize(
    "alpha",
    [torch.tensor(4), torch.tensor([4]), torch.tensor(4, dtype=torch.int32), torch.tensor(4.0, dtype=torch.bfloat16)],
)
def test_an_alpha_of_any_number_type_is_read(tmp_path, alpha):
    save_file(whole(**{"diffusion_model.layers.3.attention.to_q.alpha": alpha}), tmp_path / "a.safetensors")
    assert lorafile.read(tmp_path / "a.safetensors").factors[NAME].scale == 2.0


def test_parts_of_rank_zero_are_left_out_and_said(tmp_path):
    stem = "diffusion_model.layers.4.attention.to_k"
    save_file(
        whole(
            **{
                f"{stem}.lora_A.weight": torch.zeros(0, 8),
                f"{stem}.lora_B.weight": torch.zeros(8, 0),
                f"{stem}.alpha": torch.tensor(0.0),
            }
        ),
        tmp_path / "a.safetensors",
    )
    found = lorafile.read(tmp_path / "a.safetensors")
    assert list(found.factors) == [NAME] and found.leftover == ()
    assert any(
        "1 parts of rank 0 are nothing and were left out (for example layers.4.attention.to_k)" in note
        for note in found.notes
    )


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("lora_alpha", "8", True),
        ("ss_network_alpha", "1.0", True),
        ("alpha", "2", False),
        ("lora_alpha", "auto", False),
        ("other", "8", False),
    ],
)
def test_a_strength_that_only_the_header_knows_is_told(tmp_path, key, value, said):
    save_file(whole(), tmp_path / "a.safetensors", {key: value})
    notes = lorafile.read(tmp_path / "a.safetensors").notes
    assert any("The header says alpha" in note for note in notes) == said


def test_a_lora_whose_every_alpha_is_zero_is_said_to_do_nothing(tmp_path):
    save_file(whole(**{"diffusion_model.layers.3.attention.to_q.alpha": torch.tensor(0.0)}), tmp_path / "a.safetensors")
    assert lorafile.read(tmp_path / "a.safetensors").notes == ("Every alpha is 0: this LoRA does nothing.",)


def test_metadata_with_numbers_in_it_is_read(tmp_path):
    save_file(whole(), tmp_path / "a.safetensors", {"steps": "500"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(raw.replace(b'"500"', b"500  "))
    found = lorafile.read(tmp_path / "a.safetensors")
    assert found.metadata["steps"] == "500" and list(found.factors) == [NAME]


def test_what_is_bundled_with_a_lora_is_left_out_by_convert_and_said(tmp_path):
    save_file(whole(**{"bundle_emb.zvk.qwen3_4b": torch.ones(1, 8)}), tmp_path / "a.sft")
    made = convert.convert(tmp_path / "a.sft", 0, "fp32")
    assert "Left out are 1 bundled embedding" in made.report and len(made.state) == 2
