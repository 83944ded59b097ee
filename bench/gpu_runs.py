"""Parts that train whole runs and draw: the same bits again, after a stop too, and weights that stay clean."""

import hashlib
import statistics
import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bench import gpu_speed
from bench.gpu_place import TOKENS, Place, spread
from zturbo import dataset, roles, runs
from zturbo.hosts import comfy_cache, comfy_draw
from zturbo.recipe import Compute, Recipe, Saving, Turbo
from zturbo.runs import Runs

STEPS, SAVE_EVERY, CUT_AT = 6, 3, 4
CAPTION = " ".join(["a photo of zvk on a table"] + ["beside a cup of tea and an old book"] * (TOKENS // 10))
REPEATS = ("exact", "fast")  # of Compute's `repeat`


class Cut(Exception):
    """What the person at the screen cancels with."""


class Watching(roles.Unattended):
    """Writes down when each step ended and what the run said; cancels after a step."""

    def __init__(self, cut_at: int):
        self.cut_at, self.steps, self.sentences, self.last = cut_at, [], [], time.perf_counter()
        self.how = ""

    def begin(self, described: str):
        self.sentences.append(described)

    def end(self, how: str, saved: int):
        self.how = how

    def say(self, sentence: str):
        self.sentences.append(sentence)

    def step(self, event: dict):
        now = time.perf_counter()
        took, self.last = round(now - self.last, 3), now
        self.steps.append({"step": event["step"], "loss": event["loss"], "memory": event["memory"], "s": took})

    def check(self):
        if self.cut_at and self.steps and self.steps[-1]["step"] >= self.cut_at:
            raise Cut


@dataclass
class Trainings:
    """Runs on the same pictures, one after another, each a fact."""

    place: Place
    pictures: dataset.Dataset
    facts: dict

    def run(self, key: str, given: Recipe, resume: str = runs.NEW, cut_at: int = 0) -> dict:
        """Seconds, memory, steps, the LoRA's digest and number of keys."""
        home = Runs(self.place.files / "runs")
        host = self.place.host(given, cache=home.cache)
        watchers: list[Watching] = []

        def control(_) -> Watching:
            watchers.append(Watching(cut_at))
            return watchers[-1]

        started, done = time.perf_counter(), None
        with self.place.memory() as memory:
            try:
                done = runs.conduct(given, self.pictures, host, home, resume, control, Cut)
            except Cut:
                assert cut_at
        fact = {"way": host.way, "seconds": round(time.perf_counter() - started, 1), **memory}
        fact |= {"how": watchers[0].how, "steps": watchers[0].steps, "said": watchers[0].sentences[:6]}
        fact |= gpu_speed.room(host)
        if done is not None:
            fact |= self.learnt(done.run.lora)
        self.place.note(key, fact)
        self.facts[key] = fact
        return fact

    def learnt(self, path) -> dict:
        self.place.lora.write_bytes(path.read_bytes())
        state = load_file(path)
        total = hashlib.sha256()
        for name, tensor in sorted(state.items()):
            total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return {"sha256": total.hexdigest()[:16], "keys": len(state)}

    def digest(self, key: str) -> str | None:
        return self.facts.get(key, {}).get("sha256")

    def same(self, key: str, one: str, other: str):
        """Do two runs end with the same bits? No fact where one did not end."""
        if self.digest(one) and self.digest(other):
            self.place.note(key, self.digest(one) == self.digest(other))


def make_pictures(place: Place, side: int) -> dataset.Dataset:
    folder = place.files / f"pictures_{side}"
    folder.mkdir(exist_ok=True)
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTION, encoding="utf-8")
    return dataset.from_folder(folder, (side,), "zvk")


def trainings(place: Place) -> Trainings:
    return Trainings(place, make_pictures(place, place.sides[0]), {})


def six_steps(place: Place, name: str, way: str = "auto", **compute) -> Recipe:
    given = place.recipe(way, True, name=name, steps=STEPS, saving=Saving(every=SAVE_EVERY), turbo=Turbo(every=0))
    return replace(given, compute=replace(given.compute, **compute))


def repeats() -> list[dict[str, str]]:
    """Every setting of determinism that the recipe has."""
    known = {field.name for field in fields(Compute)}
    return [{"repeat": value} for value in REPEATS] if "repeat" in known else [{}]


def fingerprint(place: Place) -> str:
    return comfy_cache.fingerprint(place.model(), ())[:16]


def looked_at(place: Place) -> str | None:
    with place.attempt("fingerprint_before"):
        return fingerprint(place)


def clean_weights(place: Place, before: str | None):
    with place.attempt("clean_weights"):
        after = fingerprint(place)
        place.note("fingerprint", {"before": before, "after": after})
        place.note("clean_weights", before == after)


def run_all(place: Place):
    """Three runs in a session, stop and resume, the other way to carry the adapter; for each setting of determinism."""
    made = trainings(place)
    before = looked_at(place)
    for number, setting in enumerate(repeats()):
        again(place, made, setting, first=number == 0)
    clean_weights(place, before)


def again(place: Place, made: Trainings, setting: dict[str, str], first: bool):
    """The same run again, cut and resumed, under one setting. first: of all settings, with what needs no other."""
    word = setting.get("repeat", "default")
    key = {name: f"{word}.{name}" for name in ("first", "second", "third", "cut", "resumed", "other_way")}
    for name in ("first", "second", *(("third",) if first else ())):
        with place.attempt(key[name]):
            made.run(key[name], six_steps(place, f"{word}_run", **setting))
    made.same(f"{word}.repeatable", key["first"], key["second"])
    with place.attempt(key["resumed"]):
        made.run(key["cut"], six_steps(place, f"{word}_cut", **setting), cut_at=CUT_AT)
        made.run(key["resumed"], six_steps(place, f"{word}_cut", **setting), resume=runs.AUTO)
    made.same(f"{word}.resume_same_bits", key["first"], key["resumed"])
    whole = [made.facts[key[name]] for name in ("first", "second", "third") if key[name] in made.facts]
    pace(place, f"{word}.pace", whole)
    if first and key["first"] in made.facts:
        other = "branch" if made.facts[key["first"]]["way"] == "merged" else "merged"
        with place.attempt(key["other_way"]):
            made.run(key["other_way"], six_steps(place, f"{word}_{other}", other, **setting))


def pace(place: Place, key: str, ended: list[dict]):
    """What the first step and a checkpoint cost beside a step in the midst: a save shows in the step after it."""
    if not ended:
        return
    after = {SAVE_EVERY * n + 1 for n in range(1, STEPS)}
    times = [(step["step"], step["s"]) for run in ended for step in run["steps"]]
    usual = [s for number, s in times if number != 1 and number not in after]
    saved = [s for number, s in times if number in after]
    ratio = round(statistics.median(saved) / statistics.median(usual), 2)
    firsts = [s for number, s in times if number == 1]
    fact = {"step_s": spread(usual, 3), "after_checkpoint_s": spread(saved, 3), "first_step_s": spread(firsts, 3)}
    place.note(key, {**fact, "after_checkpoint_ratio": ratio})


def static(place: Place):
    """Without dynamic VRAM: load, two runs, clean weights, one timed step."""
    place.note("dynamic_vram", place.dynamic)
    place.note("load_s", round(place.seconds(place.model), 2))
    made = trainings(place)
    before = looked_at(place)
    for name in ("first", "second"):
        with place.attempt(name):
            made.run(name, six_steps(place, "static"))
    made.same("repeatable", "first", "second")
    clean_weights(place, before)
    with place.attempt("step"):
        gpu_speed.one(place, "step", "bf16", "merged", True, place.sides[0])


def draws(place: Place):
    """8 steps at the largest side, without and with the LoRA that was trained last."""
    side = place.sides[-1]
    place.note("side", side)
    with torch.inference_mode():
        prompts: list = []
        place.note("encode_s", round(place.seconds(lambda: prompts.append(encode(place))), 2))
        draw_twice(place, "plain_s", place.model(), prompts[0], side)
        if place.lora.is_file():
            model = comfy_draw.with_lora(place.model(), load_file(place.lora))
            draw_twice(place, "with_lora_s", model, prompts[0], side)
        else:
            place.note("with_lora_s", "no LoRA: the part runs has not trained one")


def encode(place: Place):
    return comfy_draw.encode_prompt(place.clip(), CAPTION)


def draw_twice(place: Place, key: str, model, prompt, side: int):
    """The first loads or patches the weights."""
    how = comfy_draw.Drawing(side, side, 8, 0, "euler")
    times = [place.seconds(lambda: comfy_draw.sample(model, prompt, how)) for _ in range(2)]
    place.note(key, {"first": round(times[0], 2), "again": round(times[1], 2)})
