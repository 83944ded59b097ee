"""Damaged LoRA files, and models that are none. Kinds for `bench fuzz`."""

import io
import json
import os
import random
import struct

import torch
from safetensors.torch import load, save

from bench.fuzz_damage import damage, value
from bench.fuzz_watch import Damaged, Place
from zturbo import convert, lorafile, loranames
from zturbo.hosts import comfy_load
from zturbo.lorafile import module_targets
from zturbo.recipe import Recipe

TARGETS = [
    module_targets("layers.0.attention.qkv", 16, 48),
    module_targets("layers.0.attention.out", 16, 16),
    module_targets("layers.1.feed_forward.w1", 16, 32),
]
STEMS = {
    "layers.0.attention.to_q": (16, 16),
    "layers.0.attention.qkv": (16, 48),
    "layers.0.attention.to_out.0": (16, 16),
    "layers.1.feed_forward.w1": (16, 32),
}
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "I64",
    "I32",
    "I8",
    "U8",
    "U16",
    "BOOL",
    "C64",
    "X9",
    "",
    5,
    None,
)


# LoRA files


def pair(rng: random.Random, stem: str, rank: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of one LoRA, named as one of the dialects does."""
    inside, outside = STEMS[stem]
    random_of = torch.Generator().manual_seed(rng.randrange(2**32))
    down, up = torch.randn(rank, inside, generator=random_of), torch.randn(outside, rank, generator=random_of)
    key, (a, b) = rng.choice(
        (
            ("diffusion_model." + stem, (".lora_A.weight", ".lora_B.weight")),
            ("transformer." + stem, (".lora_A.weight", ".lora_B.weight")),
            ("lora_unet_" + stem.replace(".", "_"), (".lora_down.weight", ".lora_up.weight")),
        )
    )
    return {key + a: down, key + b: up, key + ".alpha": torch.tensor(float(rng.choice((1, 2, 4))))}


def lycoris(rng: random.Random) -> dict[str, torch.Tensor]:
    """A LoKr or a LoHa."""
    key = "diffusion_model.layers.1.feed_forward.w1."
    if rng.random() < 0.5:
        return {
            key + "lokr_w1": torch.randn(4, 4),
            key + "lokr_w2_a": torch.randn(8, 2),
            key + "lokr_w2_b": torch.randn(2, 4),
            key + "alpha": torch.tensor(2.0),
        }
    shapes = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 16), "hada_w2_a": (32, 2), "hada_w2_b": (2, 16)}
    return {key + name: torch.randn(*shape) for name, shape in shapes.items()}


def whole(rng: random.Random) -> dict[str, torch.Tensor]:
    """A LoRA for TARGETS."""
    stems = rng.sample(
        [stem for stem in STEMS if stem != ("layers.0.attention.qkv", "layers.0.attention.to_q")[rng.randrange(2)]], 2
    )
    state = {key: tensor for stem in stems for key, tensor in pair(rng, stem).items()}
    return state | lycoris(rng) if rng.random() < 0.3 and "layers.1.feed_forward.w1" not in stems else state


def read_lora(path):
    """Read and fit as the adapter node and a run's start do.

    What comes out must be finite and of the model's shapes.
    """
    file = lorafile.read(path)
    lorafile.check_fit(file.factors, TARGETS, "it")
    places = {part.name: (part.size, target.in_features) for target in TARGETS for part in target.parts}
    assert file.factors, "no factors"
    for name, one in file.factors.items():
        delta = one.delta()
        assert tuple(delta.shape) == places[name] and delta.dtype == torch.float32, (
            f"{name} has the shape {tuple(delta.shape)}"
        )
        assert all(tensor.float().isfinite().all() for tensor in one.tensors.values()), f"{name} is not finite"
        assert one.rank > 0 and one.scale == one.scale and abs(one.scale) < float("inf"), (
            f"{name} has the scale {one.scale}"
        )
    assert isinstance(file.metadata, dict) and all(
        isinstance(word, str) for item in file.metadata.items() for word in item
    ), "metadata is not text"
    again, leftover = lorafile.parse(lorafile.state_dict(file.factors, torch.float32))
    assert not leftover and again.keys() == file.factors.keys(), "it does not survive being written"
    return file


def reads_as(path, raw: bytes):
    """Read; the numbers must be those that stand in the file."""
    file = read_lora(path)
    stored = {bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in load(raw).values()}
    for name, one in file.factors.items():
        if name.split(".")[-1] not in ("to_q", "to_k", "to_v"):  # not parts of a fused one
            for key, tensor in one.tensors.items():
                assert bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) in stored, (
                    f"{name}.{key} is not in the file"
                )
    assert {key for key in load(raw) if loranames.canonical(loranames.kind(key)[1]) is None} == set(file.leftover), (
        "keys were lost"
    )


def lora_bytes(rng: random.Random, place: Place) -> Damaged:
    """A LoRA file, damaged anywhere."""
    what, raw = damage(save(whole(rng), {"format": "pt", "a": "b"}), rng)
    path = place.loras / "l.safetensors"
    path.write_bytes(raw)
    return Damaged(what, lambda: reads_as(path, raw))


def with_header(header: object, body: bytes, size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if size is None else size) + raw + body


def split(raw: bytes) -> tuple[dict, bytes]:
    """(header, body) of a safetensors file."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def lora_header(rng: random.Random, place: Place) -> Damaged:
    """A LoRA file whose header lies."""
    header, body = split(save(whole(rng), {"a": "b"}))
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    start, end = entry["data_offsets"]
    size = None
    what = rng.choice(
        (
            "size",
            "nested",
            "not utf-8",
            "offsets",
            "shape",
            "dtype",
            "metadata",
            "entry",
            "twice",
            "extra",
            "long key",
            "no tensors",
        )
    )
    if what == "size":
        size = rng.choice((0, 1, 100_000_000, 2**31, 2**40, 2**63, 2**64 - 1, len(body)))
    elif what == "offsets":
        entry["data_offsets"] = rng.choice(
            (
                [start, end + 4],
                [start + 4, end],
                [0, 8],
                [end, start],
                [-1, 5],
                [2**64, 2**64 + 4],
                [2**60, 2**60 + end - start],
                [start],
                "0",
                [0.5, 2],
                None,
            )
        )
    elif what == "shape":
        entry["shape"] = rng.choice(
            (
                [],
                [0],
                [-1, 16],
                [2**40, 2**40],
                [2**63, 2],
                [2, 2, 2, 2],
                entry["shape"][::-1],
                [0, 2**62],
                "x",
                [1.5],
                None,
                [1] * 200,
            )
        )
    elif what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "metadata":
        header["__metadata__"] = rng.choice(
            (None, 3, [], {"a": 3}, {"a": None}, {"a": {"b": "c"}}, {"\x00": "\x00"}, "x", {"a": "x" * 2_000_000}, {})
        )
    elif what == "entry":
        header[key] = value(rng)
    elif what == "extra":
        header[rng.choice(("", "\x00", "x" * 5000, "a\nb", "../x", "🙂", "layers.0.attention.to_q"))] = {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [end, end],
        }
    elif what == "long key":
        header[
            "diffusion_model.layers.0." + "x" * 3000 + rng.choice((".lora_A.weight", "\x1b[31m.alpha", "\n.alpha"))
        ] = header.pop(key)
    elif what == "no tensors":
        header, body = {"__metadata__": {"a": "b"}}, b""
    raw = json.dumps(header).encode()
    if what == "nested":
        deep = rng.choice((200, 5000, 200_000))
        raw = raw[:-1] + b',"x":' + b"[" * deep + b"]" * deep + b"}"
    elif what == "not utf-8":
        raw = raw.replace(b"diffusion", rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\xc3"))).replace(
            b'"a"', b'"\\ud800"'
        )
    elif what == "twice":
        raw = raw[:-1] + b"," + json.dumps({key: entry}).encode()[1:]
    path = place.loras / "l.safetensors"
    path.write_bytes(with_header(raw, body, size))
    return Damaged(f"{what} of {key[:60]!r}: {str(header.get(key))[:200]}", lambda: read_lora(path))


def bad_tensor(rng: random.Random, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """(what is wrong, the tensor so changed)."""
    what = rng.choice(
        (
            "dtype",
            "nan",
            "inf",
            "huge",
            "zero rank",
            "flat",
            "deep",
            "transposed",
            "cut",
            "one number",
            "conv",
            "fp8",
            "tiny",
        )
    )
    if what == "dtype":
        kind = rng.choice(
            (torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float16, torch.complex64)
        )
        return f"{what} {kind}", tensor.to(kind)
    if what in ("nan", "inf", "huge", "tiny"):
        changed = tensor.clone()
        changed.reshape(-1)[rng.randrange(tensor.numel())] = {
            "nan": float("nan"),
            "inf": float("-inf"),
            "huge": 3e38,
            "tiny": 1e-45,
        }[what]
        return what, changed
    changes = {
        "zero rank": lambda: tensor.reshape(-1)[:0].reshape(0, 16), "flat": lambda: tensor.reshape(-1),
        "deep": lambda: tensor[None, None], "transposed": lambda: tensor.mT if tensor.ndim == 2 else tensor[None],
        "cut": lambda: tensor.reshape(-1)[1:], "one number": lambda: tensor.reshape(-1)[0],
        "conv": lambda: tensor[..., None, None],
        "fp8": lambda: tensor.to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2))),
    }  # fmt: skip
    return what, changes[what]().contiguous()


def lora_tensors(rng: random.Random, place: Place) -> Damaged:
    """A whole safetensors file whose tensors are no LoRA."""
    state = whole(rng)
    key = rng.choice(list(state))
    what = rng.choice(
        (
            "tensor",
            "tensor",
            "tensor",
            "missing",
            "dialects",
            "fused",
            "rename",
            "large product",
            "alpha",
            "dora",
            "stranger",
        )
    )
    if what == "tensor":
        more, state[key] = bad_tensor(rng, state[key])
        what = f"{what} {more}"
    elif what == "missing":
        state.pop(key)
    elif what == "dialects":  # the same matrix under two names
        state["base_model.model." + "layers.1.feed_forward.w1.lora_A.weight"] = torch.ones(2, 16)
        state["diffusion_model." + "layers.1.feed_forward.w1.lora_A.weight"] = torch.zeros(2, 16)
    elif what == "fused":  # to_q beside a qkv
        state = pair(rng, "layers.0.attention.qkv") | pair(rng, "layers.0.attention.to_q")
    elif what == "rename":
        state[
            rng.choice(
                (
                    key + "x",
                    key[1:],
                    key.replace("layers.", "layers.99"),
                    key.upper(),
                    key.replace(".", ".."),
                    key.replace("0", "٠"),
                )
            )
        ] = state.pop(key)
    elif what == "large product":
        stem, side = "diffusion_model.layers.1.feed_forward.w1.", rng.choice((100_000, 1_000_000))
        state = {
            stem + "lokr_w1_a": torch.zeros(side, 1),
            stem + "lokr_w1_b": torch.zeros(1, side),
            stem + "lokr_w2": torch.zeros(1, 1),
        }
    elif what == "alpha":
        alphas = [key for key in state if key.endswith(".alpha")]
        stem = alphas[0] if alphas else "diffusion_model.layers.0.attention.to_q.alpha"
        state[stem] = rng.choice(
            (
                torch.tensor([]),
                torch.ones(2),
                torch.ones(1, 1),
                torch.tensor(float("nan")),
                torch.tensor(float("inf")),
                torch.tensor(0.0),
                torch.tensor(-2.0),
                torch.tensor(3, dtype=torch.int32),
                torch.tensor(1e38),
            )
        )
        what += f" {state[stem]}"
    elif what == "dora":
        stem = key.rsplit(".", 2)[0] if key.endswith(".weight") else key.removesuffix(".alpha")
        state[stem + ".dora_scale"] = rng.choice(
            (torch.ones(1, 16), torch.ones(16, 1), torch.ones(16), torch.tensor(1.0), torch.full((1, 16), float("nan")))
        )
    elif what == "stranger":
        state = {rng.choice(("lora_unet_down_blocks_0.lora_down.weight", "conv.weight", "")): torch.ones(2, 2)} | (
            state if rng.random() < 0.5 else {}
        )
    raw = save(state)
    path = place.loras / "l.safetensors"
    path.write_bytes(raw)
    return Damaged(f"{what} {key}", lambda: reads_as(path, raw))


def lora_in_place(rng: random.Random, place: Place) -> Damaged:
    """Something else where a LoRA file should be."""
    path = place.loras / "l.safetensors"
    what = rng.choice(("folder", "nothing", "dangling link", "loop", "pipe", "null device", "zero device", "empty"))
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "empty":
        path.touch()
    elif what != "nothing":
        path.symlink_to(
            {
                "dangling link": place.loras / "gone",
                "loop": path,
                "null device": "/dev/null",
                "zero device": "/dev/zero",
            }[what]
        )
    return Damaged(what, lambda: reads_as(path, b""))


# Models


def model_files(rng: random.Random, place: Place) -> Damaged:
    """A diffusion model, a text encoder or a VAE that is none: always refused."""
    kind = rng.choice((comfy_load.load, comfy_load.load_model, comfy_load.load_vae, comfy_load.load_clip))
    prefix = rng.choice(("", "model.diffusion_model.", "text_encoders.qwen3_4b.transformer.", "vae."))
    begun = {
        "cap_embedder.1.weight": torch.ones(64, 2),
        "noise_refiner.0.attention.k_norm.weight": torch.ones(8),
        "layers.0.attention.qkv.weight": torch.ones(2, 2),
    }
    state = rng.choice(
        (
            whole(rng),
            {prefix + key: tensor for key, tensor in begun.items()},
            {prefix + "decoder.conv_in.weight": torch.ones(2, 2)},
            {"foo": torch.ones(3)},
            {"decoder.conv_in.weight": torch.ones(2, 2)},
            {"model.layers.0.self_attn.k_norm.weight": torch.ones(8)},
            {},
        )
    )
    what, raw = damage(save(state, {"a": "b"}), rng) if rng.random() < 0.6 else ("whole", save(state))
    path = place.temp / ("m" + rng.choice((".safetensors", ".safetensors", ".sft", ".ckpt", ".pt", "")))
    if path.suffix in (".ckpt", ".pt") and rng.random() < 0.5:
        content = io.BytesIO()
        torch.save(rng.choice((state, {"state_dict": Recipe()}, 3)), content)
        what, raw = "pickle", content.getvalue()
    if rng.random() < 0.1:
        what, raw = (
            "no download",
            rng.choice(
                (
                    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                    b"<!DOCTYPE html><html>",
                    b"Entry not found",
                    b"GGUF\x03\0\0\0",
                    b"PK\x03\x04",
                )
            ),
        )
    path.write_bytes(raw)

    def feed():
        kind(path)
        raise AssertionError("it was taken for a model")

    return Damaged(f"{kind.__name__} of {path.name}: {what}, {list(state)[:2]}", feed)


def peft(rng: random.Random) -> tuple[dict[str, torch.Tensor], dict]:
    """A LoRA under PEFT's names, and its configuration."""
    stem = rng.choice(list(STEMS))
    inside, outside = STEMS[stem]
    state = {
        f"base_model.model.{stem}.lora_A.weight": torch.ones(2, inside),
        f"base_model.model.{stem}.lora_B.weight": torch.ones(outside, 2),
    }
    return state, {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {stem: 8},
    }


PATTERNS = (
    "(",
    "[",
    "(a+)+b",
    "(.*)*",
    "(l|l|l|l)*x",
    ".*" * 12 + "x",
    "(?:.+)+!",
    "x{1000}{1000}",
    "(.)\\1+",
    "\\d+",
    "w1",
    "*",
    "x" * 2000,
    "(?P<a>",
    "",
    "to_[qkv]",
    "(" * 200 + ")" * 200,
    "a{99999999999999}",
)


def lora_config(rng: random.Random, place: Place) -> Damaged:
    """PEFT's configuration, beside the file or in its header, damaged."""
    state, config = peft(rng)
    what = rng.choice(("damage", "value", "value", "pattern", "pattern", "type"))
    if what == "value":
        config[rng.choice(list(config))] = value(rng)
    elif what == "pattern":
        config[rng.choice(("rank_pattern", "alpha_pattern"))] = {rng.choice(PATTERNS): rng.choice((4, value(rng)))}
    raw = json.dumps(value(rng) if what == "type" else config)
    if what == "damage":
        raw = damage(raw.encode(), rng)[1].decode("latin-1")
    path = place.loras / "l.safetensors"
    if rng.random() < 0.5:
        path.write_bytes(save(state, {"lora_adapter_metadata": raw.encode("utf-8", "replace").decode()}))
    else:
        path.write_bytes(save(state))
        (place.loras / "adapter_config.json").write_bytes(raw.encode("utf-8", "surrogatepass"))
    return Damaged(f"{what}: {raw[:150]!r}", lambda: read_lora(path))


def lora_converted(rng: random.Random, place: Place) -> Damaged:
    """A LoRA with one odd tensor or none, to be converted."""
    state = {**whole(rng)} if rng.random() < 0.7 else lycoris(rng)
    key, what = rng.choice(list(state)), "nothing"
    if rng.random() < 0.7:
        what, state[key] = bad_tensor(rng, state[key])
    path = place.loras / "l.safetensors"
    path.write_bytes(save(state, {"format": "pt", "ss_path": "/a/b"}))
    rank, dtype = rng.choice((0, 0, 1, 2, 1024)), rng.choice(list(lorafile.DTYPES))

    def feed():
        made = convert.convert(path, rank, dtype)
        factors, leftover = lorafile.parse(made.state)
        lorafile.check_fit(factors, TARGETS, "it")
        assert factors and not leftover and made.report and "ss_path" not in made.state.metadata
        assert all(
            tensor.dtype == lorafile.DTYPES[dtype] or name.endswith((".alpha", ".dora_scale"))
            for name, tensor in made.state.items()
        )
        source = lorafile.read(path).factors
        if dtype == "fp32" and rank == 0 and what not in ("huge", "tiny"):
            assert all(
                torch.allclose(source[name].delta(), one.delta(), rtol=1e-4, atol=1e-5) for name, one in factors.items()
            ), "another difference"

    return Damaged(f"{what} of {key} to rank {rank}, {dtype}", feed)


KINDS = [lora_bytes, lora_header, lora_tensors, lora_in_place, lora_config, lora_converted, model_files]
