"""API-format prompts for the tests: the bundled tiny model, small and short."""

TINY = "tiny (bundled)"


def node(kind: str, /, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def load() -> dict:
    return node("ZTurboLoadModel", diffusion_model=TINY, text_encoder="auto", vae="auto")


def adapter(model, direction="+1 de-distill", strength=1.0, name=TINY, declared=False) -> dict:
    return node(
        "ZTurboDeDistillAdapter",
        model=model,
        adapter=name,
        direction=direction,
        strength=strength,
        checkpoint_has_adapter=declared,
    )


def dataset(folder="bundled: smiley", trigger="zsmile", resolution=128) -> dict:
    options = {
        "more_resolutions": "",
        "caption_dropout": 0.0,
        "shuffle_tags": False,
        "keep_tags": 1,
        "flip": False,
        "upscale": False,
        "masks": "files",
        "outside": 0.1,
        "regularisation_folder": "",
        "regularisation_weight": 1.0,
        "validation": 0.0,
        "validation_every": 100,
        "cache": True,
    }
    return node("ZTurboImageDataset", folder=folder, trigger=trigger, resolution=resolution, **options)


def train(model, dataset, **changes) -> dict:
    settings = {
        "name": "test", "steps": 4, "learning_rate": 2e-3, "rank": 4, "alpha": 4.0, "batch_size": 2, "seed": 0,
        "timesteps": "sigmoid", "compute_dtype": "fp32", "gradient_checkpointing": False, "adapter_way": "auto",
        "keep_turbo": "off", "preview_prompts": "a large zsmile on a blue background", "preview_every": 0,
        "preview_width": 64, "preview_height": 64, "preview_seed": 3, "resume": "auto", "repeat": "exact",
        "keep_layers": -1, "compile": "auto",
    }  # fmt: skip
    return node(
        "ZTurboTrainLoRA", model=model, clip=["load", 1], vae=["load", 2], dataset=dataset, **{**settings, **changes}
    )


def sample(model, **changes) -> dict:
    settings = {
        "prompt": "a large zsmile on a blue background",
        "width": 64,
        "height": 64,
        "steps": 8,
        "seed": 3,
        "sampler": "euler",
        "batch_size": 1,
    }
    return node("ZTurboSampler", model=model, clip=["load", 1], vae=["load", 2], **{**settings, **changes})


def save_image(images, prefix="test/picture") -> dict:
    return node("SaveImage", images=images, filename_prefix=prefix)


def training(**changes) -> dict:
    """Load, adapter at +1, the bundled pictures, train."""
    return {
        "load": load(),
        "adapter": adapter(["load", 0]),
        "dataset": dataset(),
        "train": train(["adapter", 0], ["dataset", 0], **changes),
    }
