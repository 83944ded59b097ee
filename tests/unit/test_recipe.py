"""The recipe refuses nonsense with a sentence, and survives its own TOML."""

import pytest
import tomllib

from zturbo import recipefile
from zturbo.errors import ZTurboError
from zturbo.recipe import Compute, Loss, Network, Optimizer, Previews, Recipe, Saving, Timesteps


def test_toml_round_trip_is_exact():
    given = Recipe(
        name="my cat",
        steps=7,
        network=Network(4, 2.5),
        optimizer=Optimizer(learning_rate=1e-5),
        compute=Compute("fp32", False, "branch"),
        timesteps=Timesteps("logit_normal", 0.5, 2.0, 0.1, 0.9),
        loss=Loss("huber", 0.2, 3.0),
        saving=Saving(7, 3, "fp16"),
        previews=Previews(('say "hi"\nü', "two"), every=0),
    )
    text = recipefile.to_toml(given)
    assert recipefile.from_toml(text) == given
    assert tomllib.loads(text)["optimizer"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda: Recipe(steps=0), "steps is 0; it must be at least 1"),
        (lambda: Recipe(batch_size=-1), "batch_size is -1"),
        (lambda: Recipe(timesteps=Timesteps("gauss")), "density is 'gauss'; choose one of weighted"),
        (lambda: Recipe(timesteps=Timesteps(min_sigma=0.6, max_sigma=0.5)), "min_sigma is 0.6 and max_sigma 0.5"),
        (lambda: Recipe(timesteps=Timesteps(std=0)), "std is 0"),
        (lambda: Recipe(loss=Loss("l1")), "loss is 'l1'; choose one of mse, huber"),
        (lambda: Recipe(optimizer=Optimizer("sgd")), "optimizer is 'sgd'; choose one of adamw"),
        (lambda: Recipe(optimizer=Optimizer(schedule="step")), "schedule is 'step'; choose one of constant"),
        (lambda: Recipe(optimizer=Optimizer(ema=1.0)), "ema is 1.0"),
        (lambda: Recipe(optimizer=Optimizer(accumulation=0)), "accumulation is 0"),
        (lambda: Recipe(saving=Saving(every=0)), "save_every is 0"),
        (lambda: Recipe(network=Network(rank=0)), "rank is 0"),
        (lambda: Recipe(optimizer=Optimizer(learning_rate=float("nan"))), "learning_rate is nan"),
        (lambda: Recipe(compute=Compute(dtype="fp8")), "dtype is 'fp8'; choose one of bf16, fp32"),
        (lambda: Recipe(name="../evil"), "cannot be a file name"),
        (lambda: Recipe(name="a/b"), "cannot be a file name"),
        (lambda: Recipe(name=""), "cannot be a file name"),
        (lambda: recipefile.from_toml("stps = 3"), "unknown key 'stps', which is 3. Known here: name, steps"),
        (lambda: recipefile.from_toml("[network]\nrnk = 3"), "unknown key 'network.rnk'"),
    ],
)
def test_nonsense_gets_a_sentence(wrong, sentence):
    with pytest.raises(ZTurboError) as error:
        wrong()
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = -1", ("seed is -1",)),
        ("[network]\nrank = 0", ("network.rank is 0", "at least 1")),
        ("[optimizer]\nname = 'sgd'", ("optimizer.name is 'sgd'", "adamw")),
        ("[saving]\nevery = 0", ("saving.every is 0",)),
        ("[compute]\ndtype = 'fp8'", ("compute.dtype is 'fp8'", "bf16, fp32")),
        ("[previews]\nsteps = 0", ("previews.steps is 0",)),
        ("[loss]\nkind = 'l1'", ("loss.kind is 'l1'",)),
        ("[turbo]\nkeep = 'hold'", ("turbo.keep is 'hold'", "off, guard, restore")),
        ("[turbo]\nstop_above = 0.5\nevery = 0", ("turbo.stop_above is 0.5", "turbo.every is 0")),
        ("[turbo]\nkeep = 'restore'\nstop_above = 0.5", ("turbo.keep is restore", "turbo.stop_above is 0.5")),
        (
            "steps = 10\n[turbo]\nkeep = 'restore'\nrestore_steps = 10",
            ("turbo.keep is restore", "10 of 10 steps", "turbo.restore_steps lower"),
        ),
        ("[network]\nkind = 'dora'\n[compute]\nadapter = 'merged'", ("compute.adapter is merged", "branch")),
    ],
)
def test_what_is_wrong_in_a_file_is_said_by_its_keys(text, words):
    with pytest.raises(ZTurboError) as error:
        recipefile.from_toml(text)
    assert all(word in str(error.value) for word in words), str(error.value)
