"""Convert LoRA: resized as dense linear algebra says, errors stated, nothing lost on the way, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from zturbo import convert, lorafile
from zturbo.errors import LoraFileError
from zturbo.lowrank import Factors
from zturbo.lycoris import LoHa, LoKr

NAME = "layers.0.attention.to_q"
G = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float32)


FORMS = {
    "lora": Factors(randn(6, 24), randn(18, 6), 0.5),
    "lokr whole": LoKr(randn(3, 4), (randn(6, 6),)),
    "lokr product": LoKr(randn(3, 4), (randn(6, 2), randn(2, 6)), 0.25),
    "loha": LoHa(randn(18, 2), randn(2, 24), randn(18, 2), randn(2, 24), 2.0),
}


def write(path, lora, dtype=torch.float32, metadata=None):
    save_file(lorafile.state_dict(lora, dtype), path, metadata)
    return path


@pytest.mark.parametrize("rank", [1, 3, 5, 100])
@pytest.mark.parametrize("form", FORMS)
def test_a_resize_is_the_truncated_svd_of_the_dense_difference_and_its_error_is_stated(form, rank, tmp_path):
    one = FORMS[form]
    U, S, Vh = torch.linalg.svd(one.delta().double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    made = convert.convert(write(tmp_path / "l.safetensors", {NAME: one}), rank, "fp32")
    (got,) = lorafile.parse(made.state)[0].values()
    assert isinstance(got, Factors) and got.rank == min(rank, got.rank)
    assert torch.allclose(got.delta().double(), best, atol=1e-4 * S[0].item())
    stated = float(made.state.metadata["zturbo.conversion_error"])
    assert stated == pytest.approx((S[rank:].norm() / S.norm()).item(), rel=0.01, abs=1e-6)
    assert f"rank {got.rank}, fp32" in made.report


@pytest.mark.parametrize("form", FORMS)
def test_at_rank_0_in_fp32_every_number_stays(form, tmp_path):
    one = FORMS[form]
    made = convert.convert(write(tmp_path / "l.safetensors", {NAME: one}), 0, "fp32")
    (got,) = lorafile.parse(made.state)[0].values()
    assert type(got) is type(one) and got.scale == one.scale
    assert all(torch.equal(got.tensors[kind], tensor) for kind, tensor in one.tensors.items())
    assert "none: the same numbers" in made.report and made.state.metadata["zturbo.conversion_error"] == "0"


@pytest.mark.parametrize("form", FORMS)
def test_the_error_of_another_dtype_is_that_of_the_dense_differences(form, tmp_path):
    one = FORMS[form]
    made = convert.convert(write(tmp_path / "l.safetensors", {NAME: one}), 0, "bf16")
    (got,) = lorafile.parse(made.state)[0].values()
    expected = ((got.delta() - one.delta()).norm() / one.delta().norm()).item()
    assert expected > 1e-4 and float(made.state.metadata["zturbo.conversion_error"]) == pytest.approx(
        expected, rel=0.02
    )


def test_a_fused_lokr_that_no_one_can_split_becomes_three_loras(tmp_path):
    whole = LoKr(randn(4, 4), (randn(9, 6),))  # 36 rows, of which w1 has 4
    save_file(
        {f"diffusion_model.layers.0.attention.qkv.{kind}": tensor for kind, tensor in whole.tensors.items()},
        tmp_path / "l.safetensors",
    )
    with pytest.raises(LoraFileError, match="Give it a rank in Convert LoRA"):
        convert.convert(tmp_path / "l.safetensors", 0, "fp32")
    made = convert.convert(tmp_path / "l.safetensors", 24, "fp32")
    parts = lorafile.parse(made.state)[0]
    assert torch.allclose(
        torch.cat([parts[f"layers.0.attention.to_{letter}"].delta() for letter in "qkv"]), whole.delta(), atol=1e-4
    )
    assert float(made.state.metadata["zturbo.conversion_error"]) < 1e-6


def test_musubi_tuners_fused_lora_loses_nothing_at_the_rank_of_its_training(tmp_path):
    """Its converter for ComfyUI puts q, k and v side by side: three times the rank, and B in blocks."""
    A, blocks = randn(9, 24), [randn(18, 3) for _ in range(3)]
    path = tmp_path / "l.safetensors"
    save_file(
        {
            "lora_unet_layers_0_attention_qkv.lora_down.weight": A,
            "lora_unet_layers_0_attention_qkv.lora_up.weight": torch.block_diag(*blocks),
        },
        path,
    )
    made = convert.convert(path, 3, "fp32")
    for letter, block, rows in zip("qkv", blocks, A.split(3)):
        part = lorafile.parse(made.state)[0][f"layers.0.attention.to_{letter}"]
        assert part.rank == 3 and torch.allclose(part.delta(), block @ rows, atol=1e-4)
    assert float(made.state.metadata["zturbo.conversion_error"]) < 1e-6


def test_what_is_refused_and_what_it_says(tmp_path):
    path = tmp_path / "l.safetensors"
    write(path, {NAME: Factors(randn(4, 24), randn(18, 4), 1.0, randn(1, 24))})
    with pytest.raises(LoraFileError, match="is a DoRA .* cannot be resized .* Set rank to 0"):
        convert.convert(path, 2, "bf16")
    write(path, {NAME: Factors(randn(4, 24) * float("nan"), randn(18, 4))})
    with pytest.raises(LoraFileError, match="holds numbers that are not finite"):
        convert.convert(path, 2, "bf16")
    write(path, {NAME: Factors(randn(4, 24) * 1e6, randn(18, 4))})
    with pytest.raises(LoraFileError, match="too large for fp16. Choose bf16"):
        convert.convert(path, 0, "fp16")
    save_file(
        {"lora_unet_down_blocks_0.lora_down.weight": randn(2, 2)}
        | lorafile.state_dict({NAME: FORMS["lora"]}, torch.float32),
        path,
    )
    with pytest.raises(LoraFileError, match="1 matrices are understood, 1 keys are not"):
        convert.convert(path, 0, "bf16")
    (tmp_path / "l.pt").write_bytes(b"\x80\x02")
    with pytest.raises(LoraFileError, match="l.pt is no safetensors file"):
        convert.convert(tmp_path / "l.pt", 0, "bf16")


def test_metadata_stays_but_for_paths_and_what_is_no_longer_true(tmp_path):
    kept = {
        "ss_output_name": "fox",
        "ss_tag_frequency": '{"img/10_fox": {"fox / cat": 3}}',
        "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ",
        "ss_url": "https://example.org/a/b",
        "ss_base": "a/b",
    }
    paths = {
        "ss_sd_model_name": "/workspace/models/z.safetensors",
        "ss_datasets": '[{"image_dir": "C:\\\\Users\\\\me\\\\fox"}]',
        "ss_args": "--out=/home/me/out --lr 1",
        "ss_home": "~/fox",
        "ss_share": "\\\\server\\fox",
    }
    path = write(
        tmp_path / "l.safetensors",
        {NAME: FORMS["lora"]},
        metadata=kept | paths | {"sshs_model_hash": "old", "ss_network_dim": "6"},
    )
    made = convert.convert(path, 3, "bf16").state.metadata
    assert made == kept | {
        "ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "3",
        "zturbo.converted_from": "diffusion_model.… (ComfyUI, ai-toolkit), LoRA",
        "zturbo.conversion_error": made["zturbo.conversion_error"],
    }  # fmt: skip
    assert convert.convert(path, 0, "bf16").state.metadata["ss_network_dim"] == "6"


def test_lengths_for_each_row_need_the_model_and_the_report_says_so(tmp_path):
    """PEFT's and LyCORIS' DoRA m (W + D) / |W + D| by rows; core divides by |W|."""
    one, weight = Factors(randn(4, 24), randn(18, 4), 0.5, randn(18, 1).abs() + 1), randn(18, 24)
    path = write(tmp_path / "l.safetensors", {NAME: one})
    kept = convert.convert(path, 0, "bf16")
    assert (
        torch.equal(kept.state[f"diffusion_model.{NAME}.dora_scale"], one.magnitude)
        and "give the model that it was trained on" in kept.report
    )
    made = convert.convert(path, 0, "fp32", lambda lora, file: {NAME: weight}.__getitem__)
    changed = weight + one.delta()
    as_core = made.state[f"diffusion_model.{NAME}.dora_scale"] * changed / weight.norm(dim=1, keepdim=True)
    assert torch.allclose(as_core, one.magnitude * changed / changed.norm(dim=1, keepdim=True), atol=1e-5)
    assert "with the model's weights" in made.report


def test_pefts_scale_comes_from_the_configuration_beside(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            f"base_model.model.{NAME}.lora_A.weight": randn(4, 24),
            f"base_model.model.{NAME}.lora_B.weight": randn(18, 4),
        },
        path,
    )
    config = tmp_path / "adapter_config.json"
    for text, scale in (
        ('{"r": 4, "lora_alpha": 8}', 2),
        ('{"r": 4, "lora_alpha": 8, "use_rslora": true}', 4),
        ('{"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 1}}', 0.25),
    ):
        config.write_text(text, encoding="utf-8")
        assert lorafile.read(path).factors[NAME].scale == scale
    for text in ("{", "[]", '{"r": 0}', '{"r": "four"}'):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(LoraFileError, match="configuration of adapter_model.safetensors"):
            lorafile.read(path)
