"""LoRA files of other trainers.

Each is read, converted, and drawn by core and by diffusers as its own trainer merges it. Made by the real libraries,
with their own saving and their own merging as the measure: PEFT, diffusers, LyCORIS. Written here after their sources,
as these are no packages: musubi-tuner (networks/lora.py, loha.py, lokr.py, lora_zimage.py and
convert_z_image_lora_to_comfy.py at 30c658c), sd-scripts (networks/lora_lumina.py at 48d368f, which has no Z-Image but
its block names), OneTrainer (ZImageLoRASaver.py and LoRAModule.py at 23df383), ai-toolkit (network_mixins.py and
z_image.py at 27a03a9), and DiffSynth's names.
"""

import copy
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import comfy.lora
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
import diffusers_twin
from conftest import missing

from zturbo import cli, convert, lorafile
from zturbo.errors import LoraFileError
from zturbo.hosts import comfy_adapter, comfy_draw, comfy_tiny, comfy_weights
from zturbo.lowrank import Factors

TARGETS = r"layers\.[01]\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
CLOSE = 2e-6  # relative L2 of weight differences: fp32's, as weights are merged in fp64 here


@pytest.fixture(scope="module")
def scene(comfyui):
    """(MODEL, diffusers' Z-Image with its weights in fp32)."""
    with torch.inference_mode():
        model = comfy_tiny.load_model(comfy_tiny.MODEL)
    with torch.inference_mode(False):
        return model, diffusers_twin.build(model.model.diffusion_model, comfy_tiny.config()["unet_config"]).float()


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def trained(parameters, size=0.05):
    """As if training had moved every number."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=random) * size)


def weights(net) -> dict[str, torch.Tensor]:
    """Weight of each Linear by canonical name."""
    return {
        name: module.weight.detach().double()
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def differences(twin, merged) -> dict[str, torch.Tensor]:
    """What the library's own merge changed."""
    before, after = weights(twin), weights(merged)
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def by_equation(one, weight: torch.Tensor) -> torch.Tensor:
    """W' - W of a difference as read.

    It is D, or DoRA's m (W + D) / |W + D| (arXiv 2402.09353), along whichever axis its lengths lie.
    """
    if not isinstance(one, Factors) or one.magnitude is None:
        return one.delta()
    changed = weight + one.delta()
    axis = 0 if one.magnitude.shape[0] == 1 else 1
    return one.magnitude.double() * changed / changed.norm(dim=axis, keepdim=True) - weight


def by_core(model, state) -> dict[str, torch.Tensor]:
    """W' - W by canonical name as core's loader and its patches give them."""
    patched = comfy_draw.with_lora(model, state)
    found = {}
    for target in comfy_adapter.targets(model.model.diffusion_model):
        key = f"diffusion_model.{target.module}.weight"
        if key in patched.patches:
            clean = comfy_adapter.linears(model.model.diffusion_model)[target.module].weight.double()
            changed = (
                comfy.lora.calculate_weight(patched.patches[key], clean.clone(), key, intermediate_dtype=torch.float64)
                - clean
            )
            found |= {part.name: changed[part.rows] for part in target.parts}
    return found


def by_diffusers(twin, state) -> dict[str, torch.Tensor]:
    """W' - W as diffusers with PEFT loads the file; nothing may be left over."""
    from peft import get_peft_model_state_dict

    mine = copy.deepcopy(twin)
    converted = diffusers_twin.load_lora(mine, state)
    assert len(get_peft_model_state_dict(mine, adapter_name="default_0")) == len(converted)
    return {
        name: module.get_delta_weight("default_0").detach()
        for name, module in mine.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def agree(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance=CLOSE):
    changed = {name for name, difference in got.items() if difference.abs().max() > 0}
    assert changed == set(expected) and len(expected) >= 16
    for name, difference in expected.items():
        assert relative(got[name], difference) < tolerance, name


def check(path, scene, expected, caplog, diffusers=True):
    """Read, converted to fp32, applied by core and by diffusers: always the expected weight differences."""
    model, twin = scene
    with torch.inference_mode(False), torch.no_grad():
        file = lorafile.read(path)
        assert not file.leftover
        before = weights(twin)
        agree({name: by_equation(one, before[name]) for name, one in file.factors.items()}, expected)
        made = convert.convert(path, 0, "fp32", comfy_weights.of(model))
        agree(by_core(model, made.state), expected)
        assert (
            "lora key not loaded" not in caplog.text and "NOT LOADED" not in caplog.text and "ERROR" not in caplog.text
        )
        if diffusers:
            agree(by_diffusers(twin, made.state), expected)
        by_command(path, file, made)
        again = lorafile.write(path.with_name("again.safetensors"), made.state, {})
        twice = lorafile.state_dict(lorafile.read(again).factors, torch.float32)
        assert set(twice) == set(made.state) and all(torch.equal(twice[key], made.state[key]) for key in twice)
    return file, made


def by_command(path, file, made):
    """`inspect` says what was read, `convert` writes the same bits."""
    target = path.with_name("by_command.safetensors")
    told = io.StringIO()
    with redirect_stdout(told):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        assert (
            cli.main(["convert", str(path), str(target), "--dtype", "fp32", "--model", str(comfy_tiny.MODEL), "--json"])
            == 0
        )
    facts, converted = (json.loads(line) for line in told.getvalue().splitlines())
    assert (facts["names"], facts["rank"], facts["dtype"], facts["leftover"]) == (
        file.dialect,
        file.ranks,
        file.dtypes,
        [],
    )
    assert facts["norm"] == pytest.approx(
        sum(one.delta().norm().item() ** 2 for one in file.factors.values()) ** 0.5, rel=1e-5
    )
    state = load_file(target)
    assert (
        converted["report"] == made.report
        and state.keys() == made.state.keys()
        and all(torch.equal(state[key], made.state[key]) for key in state)
    )


PEFT = {
    "lora": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.1.attention.to_q": 2},
            "alpha_pattern": {"feed_forward.w2": 3},
        },
    ),
    "lora rslora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 6}),
    "lokr whole": ("LoKrConfig", {"r": 500, "alpha": 100}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 2, "decompose_factor": 8}),
    "lokr both": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True}),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft(kind, scene, tmp_path, caplog):
    import peft

    config, settings = PEFT[kind]
    with torch.inference_mode(False):
        net = peft.get_peft_model(copy.deepcopy(scene[1]), getattr(peft, config)(target_modules=TARGETS, **settings))
        trained(p for p in net.parameters() if p.requires_grad)
        net.save_pretrained(tmp_path)
        expected = differences(scene[1], net.double().merge_and_unload())
    path = tmp_path / "adapter_model.safetensors"
    file, made = check(path, scene, expected, caplog, diffusers="lora" in kind or "lokr" in kind)
    assert "PEFT" in file.dialect and not file.notes
    (tmp_path / "adapter_config.json").unlink()
    assert "not beside the file: 1 is assumed" in convert.convert(path, 0, "fp32").report


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_diffusers_save_lora_weights(kind, scene, tmp_path, caplog):
    """Its header holds alpha, which core does not read.

    The converted file says it in its tensors, and no longer in the header.
    """
    import peft
    from diffusers import ZImagePipeline
    from diffusers.training_utils import _collate_lora_metadata

    settings = {
        "lora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
        "lokr": peft.LoKrConfig(r=4, alpha=2, target_modules=TARGETS),
    }
    with torch.inference_mode(False):
        net = copy.deepcopy(scene[1])
        net.add_adapter(settings[kind])
        trained(p for name, p in net.named_parameters() if kind in name)
        tensors = peft.get_peft_model_state_dict(net)
        ZImagePipeline.save_lora_weights(
            str(tmp_path), transformer_lora_layers=tensors, **_collate_lora_metadata({"transformer": net})
        )
        expected = {
            name: module.get_delta_weight("default").detach()
            for name, module in net.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    _, made = check(tmp_path / "pytorch_lora_weights.safetensors", scene, expected, caplog)
    assert "lora_adapter_metadata" not in made.state.metadata


def pair(rows, columns, rank=3):
    return torch.randn(rank, columns) * 0.05, torch.randn(rows, rank) * 0.05


def flat(name: str) -> str:
    return name.replace(".", "_")


def musubi(name, A, B):
    return {
        f"lora_unet_{flat(name)}.lora_down.weight": A,
        f"lora_unet_{flat(name)}.lora_up.weight": B,
        f"lora_unet_{flat(name)}.alpha": torch.tensor(1.5),
    }


def onetrainer(name, A, B):
    return {
        f"transformer.{name}.lora_down.weight": A,
        f"transformer.{name}.lora_up.weight": B,
        f"transformer.{name}.alpha": torch.tensor(1.5),
    }


def ai_toolkit(name, A, B):
    return {f"diffusion_model.{name}.lora_A.weight": A, f"diffusion_model.{name}.lora_B.weight": B * 0.5}


def diffsynth(name, A, B):
    return {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B * 0.5}


def diffsynth_with_its_prefix(name, A, B):
    return {f"pipe.dit.{key}": tensor for key, tensor in diffsynth(name, A, B).items()}


@pytest.mark.parametrize("layout", [musubi, onetrainer, ai_toolkit, diffsynth, diffsynth_with_its_prefix])
def test_layouts_after_the_sources(layout, scene, tmp_path, caplog):
    """scale 0.5: as alpha 1.5 at rank 3, or in the numbers of trainers that write no alpha."""
    pairs = {name: pair(*weight.shape) for name, weight in weights(scene[1]).items() if re.fullmatch(TARGETS, name)}
    state = {key: tensor for name, (A, B) in pairs.items() for key, tensor in layout(name, A, B).items()}
    save_file(state, tmp_path / "l.safetensors")
    check(tmp_path / "l.safetensors", scene, {name: 0.5 * B @ A for name, (A, B) in pairs.items()}, caplog)


def test_kohya_on_the_fused_qkv(scene, tmp_path, caplog):
    """sd-scripts' Lumina names, and what musubi-tuner's converter for ComfyUI makes.

    That is one A for q, k and v, or three times the rank with a block B.
    """
    state, expected = {}, {}
    for target in comfy_adapter.targets(scene[0].model.diffusion_model, ("layers.0.", "layers.1.")):
        rank = 9 if target.module.startswith("layers.1.") and len(target.parts) == 3 else 3
        A, B = pair(target.out_features, target.in_features, rank)
        for part, block in zip(target.parts, range(0, rank, 3)):
            if rank == 9:
                B[part.rows, [n for n in range(9) if not block <= n < block + 3]] = 0
        state |= {
            f"lora_unet_{flat(target.module)}.{kind}": tensor
            for kind, tensor in {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(rank / 2)}.items()
        }
        expected |= {part.name: (0.5 * B @ A)[part.rows] for part in target.parts}
    save_file(state, tmp_path / "l.safetensors")
    check(tmp_path / "l.safetensors", scene, expected, caplog)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_lokr_after_the_sources(prefix, scene, tmp_path, caplog):
    """musubi-tuner's under kohya's names, ai-toolkit's under its own.

    Two whole matrices have no scale, whatever alpha says; a decomposed one has alpha / rank.
    """
    state, expected = {}, {}
    for name, weight in weights(scene[1]).items():
        if re.fullmatch(TARGETS, name):
            rows, columns = weight.shape
            w1, w2_b, w2_a = torch.randn(4, 4) * 0.1, *pair(rows // 4, columns // 4)
            whole = name.endswith("w1")
            parts = {"lokr_w1": w1, "alpha": torch.tensor(1.5)} | (
                {"lokr_w2": w2_a @ w2_b} if whole else {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b}
            )
            state |= {
                (f"{prefix}{flat(name)}" if prefix.endswith("_") else prefix + name) + f".{kind}": tensor
                for kind, tensor in parts.items()
            }
            expected[name] = torch.kron(w1, w2_a @ w2_b) * (1 if whole else 0.5)
    save_file(state, tmp_path / "l.safetensors")
    check(tmp_path / "l.safetensors", scene, expected, caplog)


def test_linears_outside_the_blocks_go_along(scene, tmp_path, caplog):
    """PEFT's all-linear and LyCORIS' full preset train them too; core and diffusers read them by diffusers' names."""
    model, twin = scene
    outside = {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "cap_embedder.1": "cap_embedder.1",
    }
    every = weights(twin)
    pairs = {name: pair(*every[name].shape) for name in outside}
    for prefix, name_of in (
        ("transformer.", str),
        ("lora_unet_", lambda name: flat(outside[name])),
        ("lycoris_", flat),
    ):
        state = {}
        for name, (A, B) in pairs.items():
            state |= {f"{prefix}{name_of(name)}.lora_down.weight": A, f"{prefix}{name_of(name)}.lora_up.weight": B}
        save_file(state, tmp_path / "l.safetensors")
        made = convert.convert(tmp_path / "l.safetensors", 0, "fp32")
        patched = comfy_draw.with_lora(model, made.state)
        assert (
            set(patched.patches) == {f"diffusion_model.{module}.weight" for module in outside.values()}
            and "not loaded" not in caplog.text
        )
        with torch.inference_mode(False), torch.no_grad():
            got = by_diffusers(twin, made.state)
        assert all(relative(got[name], B @ A) < CLOSE for name, (A, B) in pairs.items())


LYCORIS = {
    "locon": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2},
    "locon rs": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2, "rs_lora": True},
    "locon scalar": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2, "use_scalar": True},
    "dora rows": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2, "dora_wd": True},
    "dora columns": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2, "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha", "linear_dim": 3, "linear_alpha": 1},
    "lokr": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 2, "factor": 8},
    "lokr both": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "decompose_both": True},
    "lokr whole": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "full_matrix": True},
}


def lycoris_file(scene, path, settings):
    """Written by LyCORIS: (its network, the model that the network is on)."""
    try:
        from lycoris import LycorisNetwork, create_lycoris
    except ImportError:
        missing("needs lycoris-lora: `python dev.py test` installs it")
    with torch.inference_mode(False):
        torch.manual_seed(6)  # LyCORIS draws from the global state; core's DoRA comes within 1.9 to 2.05e-6 of it
        net = copy.deepcopy(scene[1])
        LycorisNetwork.apply_preset({"target_module": ["ZImageTransformerBlock"]})
        lycoris = create_lycoris(net, 1.0, **settings)
        lycoris.apply_to()
        trained(lycoris.parameters())
        lycoris.save_weights(str(path), torch.float32, {})
        return lycoris, net


def by_forward(twin, net) -> dict[str, torch.Tensor]:
    """W' - W of the Linears whose forward LyCORIS has replaced."""
    before, changed = weights(twin), {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and "forward" in vars(module):
            y = module(torch.eye(module.in_features, dtype=torch.float64))
            changed[name] = (y if module.bias is None else y - module.bias).T - before[name]
    return changed


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(kind, scene, tmp_path, caplog):
    """Measured by its own forward, that of training.

    The merge_to of lycoris-lora 4.1.3 multiplies the scale of LoHa and LoKr twice.
    """
    lycoris, net = lycoris_file(scene, tmp_path / "l.safetensors", LYCORIS[kind])
    with torch.inference_mode(False), torch.no_grad():
        lycoris.double()
        expected = by_forward(scene[1], net.double())
    file, made = check(
        tmp_path / "l.safetensors", scene, expected, caplog, diffusers=kind.startswith(("locon", "lokr"))
    )
    assert "LyCORIS" in file.dialect


@pytest.mark.parametrize("algo", [{"algo": "lokr", "dora_wd": True}, {"algo": "full"}, {"algo": "diag-oft"}])
def test_lycoris_forms_that_no_lora_holds_are_refused(algo, scene, tmp_path):
    lycoris_file(scene, tmp_path / "l.safetensors", {"linear_dim": 4, "linear_alpha": 2} | algo)
    with pytest.raises(LoraFileError, match="is not understood|is not a LoRA for Z-Image|holds no LoRA"):
        convert.convert(tmp_path / "l.safetensors", 0, "bf16")
