"""The recipe: every setting of a run, with its default, unit, range and meaning. A run is a function of this and of its
pictures.

Frozen, so that nothing changes it in mid-run. A setting stands once, at its field, here or in a part of the recipe
(`recipe_learning`, `recipe_running`): see `settings.setting`.
"""

from dataclasses import dataclass, field

from . import settings
from .errors import ZTurboError
from .filenames import bad_name
from .recipe_learning import MASKS, OPTIMIZERS, Data, Loss, Network, Optimizer, Timesteps
from .recipe_running import AdapterCourse, Compute, Inputs, Previews, Saving, Turbo
from .settings import SEEDS, setting

__all__ = [
    "MASKS",
    "OPTIMIZERS",
    "AdapterCourse",
    "Compute",
    "Data",
    "Inputs",
    "Loss",
    "Network",
    "Optimizer",
    "Previews",
    "Recipe",
    "Saving",
    "Timesteps",
    "Turbo",
    "teaches",
]


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is a function of, and where its model and pictures lie. Raises ZTurboError for what is not
    allowed."""

    name: str = setting("my_lora", "Names the run's folder in output/zturbo. When it exists, _2, _3 … is added.")
    steps: int = setting(
        2000, "Optimizer steps. Usual: 500 to 3000; past that turbo wears off.", low=1, unit="steps", widget=(1, 100000)
    )
    batch_size: int = setting(
        1, "Pictures a step. Memory and time grow with it. Usual: 1 to 4.", low=1, unit="pictures", widget=(1, 64)
    )
    seed: int = setting(
        0, "Decides noise, order and the LoRA's start: the same seed gives the same LoRA.", low=0, widget=SEEDS
    )
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    optimizer: Optimizer = field(default_factory=Optimizer)
    timesteps: Timesteps = field(default_factory=Timesteps)
    loss: Loss = field(default_factory=Loss)
    compute: Compute = field(default_factory=Compute)
    adapter: AdapterCourse = field(default_factory=AdapterCourse)
    turbo: Turbo = field(default_factory=Turbo)
    previews: Previews = field(default_factory=Previews)
    saving: Saving = field(default_factory=Saving)
    inputs: Inputs = field(default_factory=Inputs)

    def __post_init__(self):
        settings.check(self)
        for part in (self.optimizer, self.timesteps, self.turbo, self.inputs):
            part.check()
        self.check()

    def check(self):
        if self.turbo.guarded and self.adapter.changes:
            raise ZTurboError(
                "keep_turbo is guard, which holds the model with the whole adapter on, and the adapter's strength goes "
                f"from {self.adapter.start:g} to {self.adapter.end:g}. Take the adapter schedule away, or set "
                "keep_turbo to off or restore."
            )
        if self.turbo.restores and self.learning_steps < 1:
            raise ZTurboError(
                f"keep_turbo is restore with the last {self.turbo.restore_steps} of {self.steps} steps: nothing is "
                "left to train pictures in. Set steps higher, or restore_steps lower."
            )
        if self.compute.adapter == "merged" and self.beside:
            raise ZTurboError(
                "adapter_way is merged, but DoRA and an adapter schedule need the adapter beside the weights. Set "
                "adapter_way to auto or branch."
            )
        if sentence := bad_name(self.name):
            raise ZTurboError(sentence)

    @property
    def learning_steps(self) -> int:
        """Steps in which pictures are trained."""
        return self.steps - self.turbo.restore_steps if self.turbo.restores else self.steps

    @property
    def beside(self) -> bool:
        """Must the adapter be carried beside the weights?"""
        return self.network.kind == "dora" or self.adapter.changes


def teaches(recipe: Recipe) -> dict[str, object]:
    """The settings that decide what is learnt, where they are not the defaults: dotted name -> value. Two recipes with
    the same ones train the same LoRA."""
    given, default = settings.flat(recipe), settings.flat(Recipe())
    idle = [
        "name",
        "inputs.",
        "previews.",
        "saving.",
        "compute.repeat",
        "compute.keep_layers",
        "compute.compile",
        "data.cache",
        "data.validation_every",
    ]
    idle += [] if recipe.turbo.stop_above else ["turbo.every"]
    idle += [] if recipe.turbo.stop_above or recipe.turbo.keep != "off" else ["turbo."]
    idle += [] if recipe.turbo.guarded else ["turbo.weight", "turbo.interval"]
    idle += [] if recipe.turbo.restores else ["turbo.restore_"]
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in given.items()
        if value != default[key] and not key.startswith(tuple(idle))
    }
