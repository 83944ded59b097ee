"""What other nodes put on a MODEL in front of training: honoured, refused or told, but never passed over."""

import sys
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_host import recipe
from test_server import events, failure, newest_run

from zturbo import lorafile
from zturbo.errors import ModelError
from zturbo.hosts import comfy_adapter, comfy_added, comfy_cache, comfy_tiny
from zturbo.hosts.comfy import ComfyHost

LORA = "in_front.safetensors"


@pytest.fixture(scope="module")
def lora(server):
    """A LoRA in models/loras that changes what is drawn."""
    (server.base / "models" / "loras" / LORA).write_bytes(comfy_tiny.ADAPTER.read_bytes())


def trained(server, name: str, kind: str, **inputs):
    """A graph that trains on what a core node made of the model."""
    graph = prompts.training(name=name, steps=1, preview_prompts="")
    graph["added"] = prompts.node(kind, model=["adapter", 0], **inputs)
    graph["train"]["inputs"]["model"] = ["added", 0]
    return graph


REFUSED = {
    "bypass": (
        "LoraLoaderBypassModelOnly",
        {"lora_name": LORA, "strength_model": 1.0},
        "The model carries a LoRA in bypass mode, put on by another node",
    ),
    "rope": (
        "ScaleROPE",
        {"scale_x": 2.0, "shift_x": 0.0, "scale_y": 2.0, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 0.0},
        "The model carries scaled positions",
    ),
}
HONOURED = {
    "a LoRA": ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": 1.0}, ""),
    "shift": ("ModelSamplingAuraFlow", {"shift": 5.0}, ""),
    "compiled": ("TorchCompileModel", {"backend": "inductor"}, ""),
    "cache": ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}, ""),
    "guidance": (
        "CFGZeroStar",
        {},
        "The model carries sampler_post_cfg_function, put on by other nodes: they act while a picture is drawn",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_training_would_not_see_is_refused_before_it(server, lora, what):
    kind, inputs, sentence = REFUSED[what]
    said = failure(server, trained(server, f"refused_{what}", kind, **inputs))
    assert sentence in said and "training would not see it" in said
    assert not list((server.base / "output" / "zturbo").glob(f"refused_{what}*"))


@pytest.mark.parametrize("what", HONOURED)
def test_what_is_weights_or_only_steers_the_sampler_is_trained_with(server, lora, what):
    kind, inputs, note = HONOURED[what]
    name = f"honoured_{what.replace(' ', '_')}"
    server.run(trained(server, name, kind, **inputs))
    notes = [event["text"] for event in events(newest_run(server, name)) if event.get("event") == "note"]
    assert [text for text in notes if "The model carries" in text] == [text for text in notes if note and note in text]
    assert any(note in text for text in notes)


def test_a_lora_model_in_bypass_mode_is_refused_by_the_gauge_and_by_an_extraction(server, lora):
    bypass = prompts.node("LoraLoaderBypassModelOnly", model=["load", 0], lora_name=LORA, strength_model=1.0)
    graph = {"load": prompts.load(), "bypass": bypass}
    health = prompts.node(
        "ZTurboHealth",
        model=["bypass", 0],
        clip=["load", 1],
        vae=["load", 2],
        file=LORA,
        prompts="a dog",
        size=64,
        seed=0,
    )
    assert "a LoRA in bypass mode" in failure(
        server, graph | {"health": health, "look": prompts.save_image(["health", 3])}
    )
    extract = prompts.node(
        "ZTurboExtractAdapter",
        undistilled=["bypass", 0],
        turbo=["load", 0],
        rank=4,
        name="no",
        dtype="bf16",
        overwrite=True,
    )
    assert "an extraction would not see it" in failure(server, graph | {"extract": extract})


def test_hooks_that_a_text_encoder_hands_on_are_refused(server, lora):
    graph = prompts.training(name="hooked", steps=1, preview_prompts="")
    graph["hook"] = prompts.node("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    graph["hooked"] = prompts.node(
        "SetClipHooks", clip=["load", 1], apply_to_conds=True, schedule_clip=False, hooks=["hook", 0]
    )
    graph["train"]["inputs"]["clip"] = ["hooked", 0]
    assert "The text encoder carries hooks (Set CLIP Hooks)" in failure(server, graph)


def around(executor, *args, **kwargs):
    return executor(*args, **kwargs)


def applied(apply, args):
    return apply(args["input"], args["timestep"], **args["c"])


def options(model) -> dict:
    return model.model_options["transformer_options"]


@pytest.mark.parametrize("put, sentence", [
    (lambda m: m.set_model_unet_function_wrapper(applied), r"a wrapper around the model \(model_function_wrapper\)"),
    (lambda m: m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other_pack", around),
        r"a wrapper around the model \(other_pack\)"),
    (lambda m: m.add_wrapper(WrappersMP.APPLY_MODEL, around), r"a wrapper around the model \(None\)"),
    (lambda m: options(m).setdefault("wrappers", {}).update({WrappersMP.DIFFUSION_MODEL: {"inner": [around]}}),
        r"a wrapper around the model \(inner\)"),
    (lambda m: m.set_model_double_block_patch(lambda args: {}), r"a patch between its blocks \(double_block\)"),
    (lambda m: m.set_model_noise_refiner_patch(lambda args: {}), r"a patch between its blocks \(noise_refiner\)"),
    (lambda m: m.add_object_patch("diffusion_model.layers.0", torch.nn.Identity()), "another diffusion_model.layers.0"),
    (lambda m: m.set_injections("other_pack", [PatcherInjection(lambda p: None, lambda p: None)]),
        "the injection other_pack"),
    (lambda m: m.hook_patches.update({object(): {}}), "hooks"),
])  # fmt: skip
def test_every_way_to_change_what_is_drawn_is_refused_and_a_clean_preview_model_is_no_turbo_of_it(tiny, put, sentence):
    model, clip, vae = tiny
    changed = model.clone()
    put(changed)
    with pytest.raises(ModelError, match=sentence):
        ComfyHost(changed, clip, vae, recipe())
    assert not comfy_adapter.alike(changed, model) and not comfy_adapter.alike(model, changed)
    assert ComfyHost(model, clip, vae, recipe()).turbo and not ComfyHost(model, clip, vae, recipe(), changed).turbo


@pytest.mark.parametrize("put, words", [
    (lambda m: m.set_model_attn1_patch(lambda *args: args), ""),  # Z-Image asks for none
    (lambda m: m.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "easycache", around), ""),
    (lambda m: m.add_object_patch("diffusion_model.layers.0", torch.compile(m.model.diffusion_model.layers[0])), ""),
    (lambda m: m.set_model_optimized_attention(around), "an attention of its own"),
    (lambda m: m.set_model_sampler_cfg_function(lambda args: args["cond"]), "sampler_cfg_function"),
    (lambda m: m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "windows", around),
        r"a wrapper of the sampler (windows)"),
    (lambda m: m.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "watcher", around), "a callback (watcher)"),
    (lambda m: m.add_callback_with_key(CallbacksMP.ON_CLEANUP, "watcher", around), ""),
])  # fmt: skip
def test_what_only_steers_or_hastens_the_sampler_is_trained_with(tiny, put, words):
    model, clip, vae = tiny
    changed = comfy_adapter.apply(model, lorafile.read(comfy_tiny.ADAPTER), "tiny", 1.0)
    put(changed)
    said = ComfyHost(changed, clip, vae, recipe()).warning()
    acting = "they act while a picture is drawn, as in previews, and not on what is trained"
    assert said == (f"The model carries {words}, put on by other nodes: {acting}." if words else "")


def test_texts_encoded_under_a_lora_in_bypass_mode_have_a_place_of_their_own_in_the_cache(tiny):
    """By what it holds and how strong it is; the same LoRA gives the same place again, also once it has been used."""
    _, clip, _ = tiny
    name = next(
        key.removesuffix(".weight")
        for key, tensor in clip.cond_stage_model.state_dict().items()
        if key.endswith("proj.weight")
    )
    out, width = clip.cond_stage_model.state_dict()[f"{name}.weight"].shape
    state = {
        f"text_encoders.{name}.lora_A.weight": torch.full((2, width), 0.1),
        f"text_encoders.{name}.lora_B.weight": torch.full((out, 2), 0.1),
    }

    def under(strength, factor=1.0):
        return comfy.sd.load_bypass_lora_for_models(
            None, clip, {key: factor * tensor for key, tensor in state.items()}, 0, strength
        )[1]

    first = under(1.0)
    places = [comfy_cache.of_clip(one) for one in (clip, first, under(1.0), under(0.5), under(1.0, 2.0))]
    assert places[1] == places[2] and len(set(places)) == 4
    with torch.inference_mode():
        plain, bypassed = (one.encode_from_tokens(one.tokenize("a fox")) for one in (clip, first))
    assert not torch.equal(
        plain[0] if isinstance(plain, tuple) else plain, bypassed[0] if isinstance(bypassed, tuple) else bypassed
    )
    assert comfy_cache.of_clip(first) == places[1]
    unknown = clip.clone()
    unknown.patcher.set_injections("other", [PatcherInjection(lambda p: None, lambda p: None)])
    assert comfy_cache.of_clip(unknown) != comfy_cache.of_clip(unknown)
    assert list(comfy_added.injected(clip.patcher)) == []


def test_a_set_drawn_under_a_lora_in_bypass_mode_goes_on_under_it_and_not_without(server, lora):
    set_of = {"name": "bypassed", "count": 2, "prompts": "a red star", "prompt_file": "", "sizes": "64x64", "seed": 0}
    graph = {
        "load": prompts.load(),
        "bypass": prompts.node("LoraLoaderBypassModelOnly", model=["load", 0], lora_name=LORA, strength_model=1.0),
    }
    graph["set"] = prompts.node("ZTurboGenerateSet", model=["bypass", 0], clip=["load", 1], vae=["load", 2], **set_of)
    server.run(graph)
    graph["set"]["inputs"]["count"] = 3
    server.run(graph)
    assert len(list((server.base / "output" / "zturbo_sets" / "bypassed").glob("*.png"))) == 3
    graph["set"]["inputs"] |= {"model": ["load", 0], "count": 4}
    assert "The set bypassed was begun with other models" in failure(server, graph)
    graph["bypass"]["inputs"]["strength_model"] = 0.5
    graph["set"]["inputs"]["model"] = ["bypass", 0]
    assert "The set bypassed was begun with other models" in failure(server, graph)
