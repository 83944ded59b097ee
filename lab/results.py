"""docs/RESULTS.md, its plots and its data, from what `lab breakdown` and `lab longrun` measured.

The words are in results.md beside this file. The data, docs/results/breakdown.json, grow: runs of this machine are
added to those that are there, and take the place of those of the same name.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats

from . import breakdown, concepts, measure, world
from .setup import ROOT, log, use_comfy

OUT = ROOT / "docs" / "results"
DATA = OUT / "breakdown.json"
CHOSEN_ON = "smiley"  # the concept that the gauge was chosen and scaled on
PICTURED = "outline"  # the concept of the page's pictures
MAIN = ("straight", "adapter", "guard", "restore")
OTHERS = ("half", "strong", "fading", "bad", "own", "guard_straight")
PASSES = ("redistil", "onpolicy")  # behind a run
LONG = ("straight", "adapter", "guard", "restore", *PASSES)
KEPT = (  # of a measurement, as it is
    "step", "loss", "fidelity", "sharpness", "frechet", "drift", "diversity", "steps_apart", "concept", "size",
)  # fmt: skip
HELD = 0.05  # of turbo lost at most, for a long-run option to count as one that keeps turbo
HOW = (  # the goal's figures are made
    "turbo_loss: 1 - (share of 144 unrelated prompts drawn right at 8 steps, CFG 1, adapter off) / clean turbo's, "
    "mean over runs at 10,000 steps; "
    "concept_vs_best_straight: share of 48 concept prompts drawn right at 10,000 steps over the best of any step of "
    "the straight run of the same concept and seed, mean over runs. Read by lab/reader.py. Made by: "
    "python dev.py lab breakdown --steps 10000 --variants straight,adapter,guard,restore; "
    "python dev.py lab longrun; python dev.py lab results"
)
PLOTS = {
    "lost": "Turbo lost on unrelated prompts",
    "concept": "Concept learnt",
    "sharpness": "Sharpness, of turbo's",
    "steps_apart": "8 steps and 50 apart",
    "diversity": "Diversity, of turbo's",
}


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab results")
    parser.add_argument("--from", dest="folder", type=Path, default=breakdown.FOLDER)
    parser.add_argument("--no-pictures", action="store_true")
    args = parser.parse_args(argv)
    rows = read(args.folder)
    OUT.mkdir(parents=True, exist_ok=True)
    DATA.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    drawn = [row for row in rows if row["concept_of"] in concepts.DRAWN]
    for key, title in PLOTS.items():
        plot(drawn, key, title)
    long = longrun(drawn)
    (OUT / "longrun.json").write_text(json.dumps(long, indent=1) + "\n", encoding="utf-8")
    if not args.no_pictures:
        picture(args.folder, PICTURED)
    fill = {
        "main": points_table(own(drawn), MAIN, (500, 2000, 10000)),
        "concepts": concepts_table(rows),
        "equal": equal_table(own(drawn)),
        "paired": beside_table(drawn, "straight", ("adapter",), (250, 500, 1000, 2000, 10000)),
        "others": beside_table(rows, "adapter", OTHERS, (500, 2000)),
        "gauge": gauge_table(own(rows)),
        "calibration": calibration(own(rows)),
        "goal": goal_sentence(long),
        "long": points_table(drawn, LONG, (10000,)),
        "runs": str(len({row["run"] for row in rows})),
    }
    text = (Path(__file__).parent / "results.md").read_text(encoding="utf-8")
    for name, content in fill.items():
        text = text.replace("{{" + name + "}}", content)
    (ROOT / "docs" / "RESULTS.md").write_text(text, encoding="utf-8")
    log.info("docs/RESULTS.md, from %d measurements", len(rows))


def read(folder: Path) -> list[dict]:
    """One row a measurement, of the runs in `folder` and of those that the data have already.

    What of turbo is lost is 1 - fidelity / clean turbo's.
    """
    rows = measured(folder)
    new = {row["run"] for row in rows}
    if DATA.is_file():
        rows += [row for row in json.loads(DATA.read_text(encoding="utf-8")) if row["run"] not in new]
    clean = next(row["fidelity"] for row in rows if row["step"] == 0)
    for row in rows:
        row["lost"] = round(1 - row["fidelity"] / clean, 4)
    return sorted(rows, key=lambda row: (row["run"], row["step"]))


def measured(folder: Path) -> list[dict]:
    """The rows of the runs in `folder`."""
    from zturbo import health

    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        concept, rest = path.stem.split("_", 1)
        variant, seed = rest.rsplit("_", 1)[0], int(path.stem.rsplit("_", 1)[1])
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            deviation = health.high(torch.tensor(row["deviation128"]).T[: health.WATCHED])
            along = sum(row["along"][:3]) / 3
            kept = {key: row[key] for key in KEPT if key in row}
            rows.append(
                {
                    "run": path.stem,
                    "concept_of": concept,
                    "variant": variant,
                    "seed": seed,
                    **kept,
                    "deviation": round(deviation, 4),
                    "along": round(along, 4),
                }
            )
    return rows


def own(rows: list[dict]) -> list[dict]:
    """Without what is another run's: until its last part a restored run is the run on the adapter, but for rounding."""
    last = {row["run"]: row["step"] for row in rows}
    return [
        row for row in rows if row["variant"] != "restore" or row["step"] > (1 - breakdown.RESTORED) * last[row["run"]]
    ]


def at(rows: list[dict], variant: str, step: int) -> list[dict]:
    """The runs of a variant at a step.

    Only those whose concept and seed were trained straight, too, so that means compare.
    """
    straight = {
        (row["concept_of"], row["seed"]) for row in rows if row["variant"] == "straight" and row["step"] == step
    }
    return [
        row
        for row in rows
        if row["variant"] == variant and row["step"] == step and (row["concept_of"], row["seed"]) in straight
    ]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def bootstrap(values: list, of: Callable[[list], float], draws: int = 400) -> tuple[float, float]:
    """95 % interval of a statistic over runs, by drawing them anew. Too narrow for few of them."""
    rng = random.Random(0)
    found = sorted(of([rng.choice(values) for _ in values]) for _ in range(draws))
    return found[draws // 40], found[-draws // 40 - 1]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of three runs or more, by Student's t."""
    if len(set(values)) <= 1:
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(0.95, len(values) - 1, mean(values), stats.sem(values))
    return float(low), float(high)


def with_interval(values: list[float], digits: int = 2) -> str:
    if len(values) < 3:
        return " and ".join(f"{value:.{digits}f}" for value in values)
    low, high = interval(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def points_table(rows, variants, steps) -> str:
    """Clean turbo, and below it each kind of training at each step; means over its runs."""
    clean = next(row for row in rows if row["step"] == 0)
    lines = [["0", "clean turbo", *point([clean]), ""]]
    for step in steps:
        for variant in variants:
            if found := at(rows, variant, step):
                lines.append([str(step), variant, *point(found), str(len(found))])
    return table(
        [
            "step",
            "trained",
            "turbo lost",
            "concept learnt",
            "sharpness",
            "Fréchet",
            "8 and 50 steps apart",
            "diversity",
            "runs",
        ],
        lines,
    )


def point(rows) -> list[str]:
    means = [
        f"{mean(row[key] for row in rows):.{digits}f}"
        for key, digits in (("frechet", 0), ("steps_apart", 3), ("diversity", 2))
    ]
    return [*(with_interval([row[key] for row in rows]) for key in ("lost", "concept", "sharpness")), *means]


def concepts_table(rows) -> str:
    """What is lost, and learnt, of each concept at the last step that it was trained straight; means over its runs."""
    lines = []
    for concept in concepts.CONCEPTS:
        of = [row for row in rows if row["concept_of"] == concept]
        step = max((row["step"] for row in of if row["variant"] == "straight"), default=0)
        found = [at(of, variant, step) for variant in MAIN]
        if any(found):
            lines.append([f"{concept}, {step:,} steps", *map(lost_and_learnt, found)])
    return table(["turbo lost, concept learnt", *MAIN], lines)


def lost_and_learnt(rows) -> str:
    if not rows:
        return ""
    return f"{mean(row['lost'] for row in rows):.2f}, {mean(row['concept'] for row in rows):.2f}"


def beside_table(rows, base: str, variants, steps) -> str:
    """Each beside the base's run of the same concept and seed: differences, with their intervals."""
    lines = []
    for step in steps:
        plain = {
            (row["concept_of"], row["seed"]): row for row in rows if row["variant"] == base and row["step"] == step
        }
        for variant in variants:
            found = [
                row
                for row in rows
                if row["variant"] == variant and row["step"] == step and (row["concept_of"], row["seed"]) in plain
            ]
            beside = [plain[row["concept_of"], row["seed"]] for row in found]
            if found:
                line = [str(step), variant]
                for key in ("lost", "concept"):
                    line += [
                        f"{mean(row[key] for row in found):.2f}",
                        with_interval([row[key] - other[key] for row, other in zip(found, beside)]),
                    ]
                lines.append([*line, str(len(found))])
    return table(
        ["step", "trained", "turbo lost", f"more than {base}", "concept learnt", f"more than {base}", "runs"], lines
    )


def equal_table(rows) -> str:
    """What of turbo is lost when the concept first is as strong as this.

    And what less on the adapter than straight, in pairs. Between measurements lines are straight.
    """

    def lost(strength: float, variant: str) -> dict[tuple, float]:
        runs = {(row["concept_of"], row["seed"]): row["run"] for row in at(rows, variant, 0)}
        found = {
            key: lost_at([row for row in rows if row["run"] == run], strength) for key, run in sorted(runs.items())
        }
        return {key: value for key, value in found.items() if value is not None}

    def cell(values: list[float]) -> str:
        return f"{with_interval(values)}, {len(values)} run{'s' * (len(values) > 1)}" if values else "not reached"

    lines = []
    for strength in (0.3, 0.5, 0.7):
        found = {variant: lost(strength, variant) for variant in MAIN[:-1]}
        pairs = sorted(found["straight"].keys() & found["adapter"].keys())
        less = [found["adapter"][key] - found["straight"][key] for key in pairs]
        lines.append([f"{strength:.1f}", *(cell(list(some.values())) for some in found.values()), cell(less)])
    return table(["concept learnt", *MAIN[:-1], "adapter, more than straight"], lines)


def lost_at(run: list[dict], strength: float) -> float | None:
    run = sorted(run, key=lambda row: row["step"])
    for before, after in zip(run, run[1:]):
        if after["concept"] >= strength > before["concept"]:
            part = (strength - before["concept"]) / (after["concept"] - before["concept"])
            return before["lost"] + part * (after["lost"] - before["lost"])
    return None


CANDIDATES = {
    "deviation at high noise (the gauge)": lambda row: row["deviation"],
    "deviation along the adapter's": lambda row: row["along"],
    "drift of the 8-step result": lambda row: row["drift"],
    "8 steps and 50 apart": lambda row: row["steps_apart"],
    "loss of sharpness": lambda row: -row["sharpness"],
    "size of B A against the adapter's": lambda row: row["size"],
    "training loss, turned round": lambda row: -row.get("loss", 0),
    "steps": lambda row: row["step"],
}


def gauge_table(rows) -> str:
    """Rank correlations with what of turbo is lost: on the concept that the gauge was chosen on, and on the others."""
    rows = [row for row in rows if row["step"] and row["variant"] not in PASSES]
    lines = []
    for name, value in CANDIDATES.items():
        line = [name]
        for of in (
            [row for row in rows if row["concept_of"] == CHOSEN_ON],
            [row for row in rows if row["concept_of"] != CHOSEN_ON],
        ):
            runs = [[row for row in of if row["run"] == run] for run in sorted({row["run"] for row in of})]
            correlation = lambda chosen, value=value: measure.rank_correlation(
                [value(row) for run in chosen for row in run], [row["lost"] for run in chosen for row in run]
            )  # noqa: E731
            low, high = bootstrap(runs, correlation)
            line.append(f"{correlation(runs):.2f} ({low:.2f} to {high:.2f}), {len(of)} points of {len(runs)} runs")
        lines.append(line)
    return table(["candidate", f"chosen on: {CHOSEN_ON}", "held out: the other concepts"], lines)


def calibration(rows) -> str:
    """How far the gauge's reading is from what of turbo is lost.

    In the mean over a concept's measurements, and at most.
    """
    from zturbo import health

    parts = []
    for concept in concepts.CONCEPTS:
        apart = [
            abs(health.gauge(row["deviation"]) - row["lost"])
            for row in rows
            if row["concept_of"] == concept and row["step"] and row["variant"] not in PASSES
        ]
        if apart:
            parts.append(f"{concept} {mean(apart):.2f} (at most {max(apart):.2f})")
    return ", ".join(parts)


def longrun(rows) -> dict:
    """The goal's figures: the best long-run option at 10,000 steps."""
    best_straight = {
        run: max(row["concept"] for row in rows if row["run"] == run)
        for run in {row["run"] for row in rows if row["variant"] == "straight"}
    }
    found = {}
    for variant in LONG:
        last = at(rows, variant, 10000)
        if last:
            ratios = [
                row["concept"] / best_straight[run]
                for row in last
                if (run := f"{row['concept_of']}_straight_{row['seed']}") in best_straight
            ]
            found[variant] = {
                "turbo_loss": round(mean(row["lost"] for row in last), 4),
                "turbo_loss_of_runs": [row["lost"] for row in last],
                "concept": round(mean(row["concept"] for row in last), 4),
                "concept_vs_best_straight": round(mean(ratios), 4) if ratios else None,
                "concept_vs_best_straight_of_runs": [round(ratio, 4) for ratio in ratios],
                "runs": [row["run"] for row in last],
            }
    kept = [name for name in found if found[name]["turbo_loss"] <= HELD]
    if kept:
        best = max(kept, key=lambda name: found[name]["concept"])
    else:
        best = min(found, key=lambda name: found[name]["turbo_loss"])
    return {
        "turbo_loss": found[best]["turbo_loss"],
        "concept_vs_best_straight": found[best]["concept_vs_best_straight"],
        "option": best,
        "how": HOW,
        "options": found,
    }


def goal_sentence(long: dict) -> str:
    """What of the goal is reached; its second half by every concept, not by their mean."""
    option = long["options"][long["option"]]
    losses, ratios = option["turbo_loss_of_runs"], option["concept_vs_best_straight_of_runs"]
    each = [
        f"{run.split('_')[0]} {lost:.3f} and {ratio:.2f}" for run, lost, ratio in zip(option["runs"], losses, ratios)
    ]
    held, strong = sum(lost <= HELD for lost in losses), sum(ratio >= 1 for ratio in ratios)
    means = f"{long['turbo_loss']:.3f} and {long['concept_vs_best_straight']:.2f}"
    return (
        f"With {long['option']}, turbo lost and the concept's strength as a share of the best straight run's: "
        f"{', '.join(each)}; in the mean {means} (144 and 48 pictures a run). "
        f"Turbo is kept in {held} of {len(each)} runs, and the concept is as strong as straight in {strong}."
    )


def plot(rows, key: str, title: str):
    from zturbo import plots

    series, bands = {}, {}
    for variant in MAIN:
        points = [(step, [row[key] for row in at(rows, variant, step)]) for step in breakdown.POINTS]
        points = [(step, values) for step, values in points if values]
        series[variant] = [(step, mean(values)) for step, values in points]
        bands[variant] = [(step, *interval(values)) for step, values in points if len(values) >= 3]
    plots.curves(series, f"{title}; bands: 95 % over three runs or more", "step", bands=bands).save(OUT / f"{key}.png")


def picture(folder: Path, concept: str, step: int = 10000):
    """Six unrelated prompts and two of the concept, at 8 steps: clean turbo above, then each kind of training."""
    from safetensors.torch import load_file

    device = use_comfy()
    dit = world.load_turbo(device)
    rng, known = random.Random(4), measure.asked(measure.UNRELATED)
    texts = [known[n] for n in (0, 5, 9, 14, 20, 31)] + [concepts.caption(concept, rng) for _ in range(2)]
    from zturbo.hosts import comfy_tiny

    features, lengths = world.caption_features(comfy_tiny.load_clip(), texts)
    drawn = []
    for variant in ("turbo", *MAIN):
        file = folder / f"{concept}_{variant}_0_{step:05d}.safetensors"
        if variant != "turbo" and not file.is_file():
            continue
        with breakdown.with_lora(dit, load_file(file) if variant != "turbo" else {}), torch.no_grad():
            drawn.append(
                world.sample(
                    dit, measure.noise(len(texts), 3).to(device), world.refine(dit, features.to(device), lengths)
                )
            )
    world.contact_sheet(
        torch.cat(drawn), world.load_autoencoder(device), OUT / f"{concept}_{step}.png", columns=len(texts)
    )
