"""What is trained where: which Linears, at which rank, in which form, and from which numbers it starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from . import lorafile, lowrank, lycoris
from .errors import LoraFileError, ZTurboError
from .family import Z_IMAGE
from .lowrank import Difference, Factors, Part, Target
from .recipe import Network

Groups = Mapping[str, str]


@dataclass(frozen=True)
class TrainableModule:
    """A module that gets a LoRA of this rank: a Linear, or the part of a fused one that has a name of its own."""

    target: Target
    part: Part
    rank: int


def trainable_modules(
    targets: list[Target], network: Network, groups: Groups = Z_IMAGE.groups
) -> list[TrainableModule]:
    """The chosen modules of the chosen layers with their ranks. groups: see `Family`.

    Raises ZTurboError when nothing is left, or a name fits nothing.
    """
    patterns = read_targets(network.targets, network.rank, groups)
    layers = read_layers(network.layers)
    chosen, used = [], set()
    for target in targets:
        for part in target.parts:
            fits = [n for n, (pattern, _) in enumerate(patterns) if fnmatchcase(part.name, pattern)]
            used.update(fits)
            rank = patterns[fits[-1]][1] if fits else 0  # the last one that fits counts
            if rank and (layers is None or layer_of(part.name) in layers):
                chosen.append(TrainableModule(target, part, rank))
    idle = [pattern for n, (pattern, _) in enumerate(patterns) if n not in used]
    if idle:
        raise ZTurboError(
            f"targets: {idle[0]!r} fits no part of the model. "
            f"There are, in each layer: {', '.join(part_names(targets))}."
        )
    last = max(layer_of(target.module) for target in targets)
    if layers and max(layers) > last:
        raise ZTurboError(f"layers: {network.layers!r} goes beyond the model, which has the layers 0 to {last}.")
    if not chosen:
        raise ZTurboError(
            f"Nothing is left to train with targets {network.targets!r}. Give at least one part a rank above 0."
        )
    return chosen


def read_targets(text: str, rank: int, groups: Groups = Z_IMAGE.groups) -> list[tuple[str, int]]:
    """`attention:32, feed_forward, *.to_q:0` -> [(glob, rank)]; nothing means everything. Raises ZTurboError."""
    patterns = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, colon, number = word.partition(":")
        if colon and not (number.strip().isdecimal() and len(number.strip()) <= 4 and int(number) <= 1024):
            raise ZTurboError(
                f"targets: {word!r} has no rank behind its colon. "
                "Write for example attention:32, a whole number from 0 (not trained) to 1024."
            )
        patterns.append((groups.get(name.strip().lower(), name.strip()), int(number) if colon else rank))
    return patterns or [("*", rank)]


def read_layers(text: str) -> set[int] | None:
    """`0-9, 20` -> layer numbers; nothing means all. Raises ZTurboError."""
    layers: set[int] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = (part.strip() for part in word.partition("-"))
        if (
            not first.isdecimal()
            or (dash and not last.isdecimal())
            or max(len(first), len(last)) > 3
            or int(last or first) < int(first)
        ):
            raise ZTurboError(f"layers: {word!r} is no layer number and no range. Write for example 0-9, 20.")
        layers.update(range(int(first), int(last or first) + 1))
    return layers or None


def layer_of(name: str) -> int:
    """The first number in a module's name."""
    return next(int(word) for word in name.split(".") if word.isdecimal())


def part_names(targets: list[Target]) -> list[str]:
    return list(dict.fromkeys(part.name.split(".", 2)[2] for target in targets for part in target.parts))


def create(
    targets: list[Target],
    network: Network,
    seed: int,
    device="cpu",
    norms: Callable[[list[Target]], dict[str, torch.Tensor]] | None = None,
    start: dict[str, Difference] | None = None,
    groups: Groups = Z_IMAGE.groups,
) -> dict[str, Difference]:
    """What a run trains, {name: Difference} in fp32 with gradients on `device`; a function of network, seed and name.

    norms: gives the column norms [1, in] of the clean weights by part, for DoRA. start: a LoRA to go on from.
    groups: see `Family`.
    """
    chosen = trainable_modules(targets, network, groups)
    magnitudes = norms([one.target for one in chosen]) if network.kind == "dora" and norms is not None else {}
    lora = {one.part.name: begin(one, network, seed, magnitudes) for one in chosen}
    if start is not None:
        lora |= continued(start, lora)
    return {name: trainable(one, device) for name, one in lora.items()}


def count(targets: list[Target], network: Network) -> int:
    """How many numbers would be trained."""
    chosen = [(one.part.size, one.target.in_features, one.rank) for one in trainable_modules(targets, network)]
    if network.kind == "lokr":
        return sum(lycoris.count_lokr(*one, network.factor) for one in chosen)
    halves = 2 if network.kind == "loha" else 1
    return halves * sum(rank * (rows + columns) for rows, columns, rank in chosen)


def begin(module: TrainableModule, network: Network, seed: int, magnitudes: dict[str, torch.Tensor]) -> Difference:
    name, rows, columns = module.part.name, module.part.size, module.target.in_features
    alpha = network.alpha * module.rank / network.rank  # a group of another rank has the same scale
    if network.kind == "lokr":
        return lycoris.create_lokr(name, rows, columns, module.rank, alpha, network.factor, seed)
    if network.kind == "loha":
        return lycoris.create_loha(name, rows, columns, module.rank, alpha, seed)
    plain = lowrank.create(name, rows, columns, module.rank, alpha, seed)
    return plain if network.kind == "lora" else Factors(plain.A, plain.B, plain.scale, magnitudes[name])


def continued(start: dict[str, Difference], lora: dict[str, Difference]) -> dict[str, Difference]:
    """The starting LoRA's numbers in the run's form: the same difference; spare ranks begin untrained.

    Raises LoraFileError where something would be lost.
    """
    lost = [name for name in start if name not in lora]
    if lost:
        raise LoraFileError(
            f"The LoRA to start from has {len(lost)} parts that this run does not train (for example {lost[0]}). "
            "Train them too: leave targets and layers empty."
        )
    taken: dict[str, Difference] = {}
    for name, given in start.items():
        mine = lora[name]
        if not (isinstance(given, Factors) and isinstance(mine, Factors)) or form(given) != form(mine):
            raise LoraFileError(
                f"The file to start from is a {form(given)}; this run trains a {form(mine)}. "
                "A run can start from a LoRA when it trains one, and from a DoRA when it trains one. "
                "Convert LoRA makes a LoRA of LoKr and LoHa."
            )
        if given.magnitude is not None and given.magnitude.shape[0] > 1:
            raise LoraFileError(
                "The LoRA to start from is a DoRA with a length for each output row; "
                "this run trains one for each input column. Start from a plain LoRA, or from nothing."
            )
        if given.rank > mine.rank:
            raise LoraFileError(
                f"The LoRA to start from has rank {given.rank}; this run has {mine.rank}. "
                f"Set rank to at least {given.rank}, or resize the file with Convert LoRA."
            )
        if given.shape != mine.shape:
            raise LoraFileError(
                f"The LoRA to start from is of another model: "
                f"{name} has the size {given.shape}, the model {mine.shape}."
            )
        A = torch.cat((given.A.float(), mine.A[given.rank :]))
        B = torch.cat((given.B.float() * (given.scale / mine.scale), mine.B[:, given.rank :]), dim=1)
        taken[name] = Factors(A, B, mine.scale, given.magnitude)
    return taken


def form(one: Difference) -> str:
    return (
        "DoRA"
        if getattr(one, "magnitude", None) is not None
        else "LoRA"
        if isinstance(one, Factors)
        else type(one).__name__
    )


def trainable(one: Difference, device) -> Difference:
    return one.of(
        {
            name: tensor.detach().to(device, torch.float32, copy=True).requires_grad_(True)
            for name, tensor in one.tensors.items()
        }
    )


def frozen_copy(lora: dict[str, Difference]) -> dict[str, Difference]:
    """The same numbers, apart and without gradients: where a moving average begins."""
    return {
        name: one.of({key: tensor.detach().clone() for key, tensor in one.tensors.items()})
        for name, one in lora.items()
    }


def describe(lora: dict[str, Difference]) -> str:
    """One line: how much is trained."""
    ranks = sorted({one.rank for one in lora.values()})
    kind = f"{form(next(iter(lora.values())))} of rank {', '.join(map(str, ranks))}"
    return f"{kind}: {lowrank.count(lora):,} numbers in {len(lora)} places."


def start_file(name: str) -> Path:
    """The LoRA to start from, where its name is a path. Raises LoraFileError."""
    if not Path(name).is_file():
        raise LoraFileError(f"There is no file {name!r}, which network.start names. Give the path of a LoRA.")
    return Path(name)


def read_start(path, targets: list[Target]) -> dict[str, Difference]:
    """A LoRA file to go on from, of any dialect. Raises LoraFileError unless all of it is understood and fits."""
    file = lorafile.read(path)
    lorafile.need_all(file.factors, list(file.leftover), path.name)
    outside = [name for name in file.factors if not name.startswith(Z_IMAGE.trained)]
    if outside:
        raise LoraFileError(
            f"{path.name} also has {len(outside)} parts outside the 30 layers (for example {outside[0]}), "
            "which a run here does not train. Choose another file to start from."
        )
    lorafile.check_fit(file.factors, targets, path.name)
    return file.factors
