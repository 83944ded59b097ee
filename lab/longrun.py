"""Two ways to bring turbo back at the end of a long run, beside the guard: a short pass after training on the adapter.

Re-distil: turbo with the LoRA is taught, at its eight noise levels, the straight line to the next one on the path that
the de-distilled model with the LoRA walks in many guided steps, for the user's own captions. The paths are drawn once.
On policy (after the idea of arXiv 2605.05204, whose teacher also sees a target picture, which the tiny model cannot):
the same lines, but from states that turbo with the LoRA has walked to itself.

Starts from what `lab breakdown --variants adapter` left at the last point; lines of `<concept>_redistil_<seed>` and
`<concept>_onpolicy_<seed>` beside it.
"""

import argparse
import json
import time

import torch
from safetensors.torch import load_file, save_file

from . import breakdown, concepts, measure, world
from .setup import log, use_comfy

SHAPES = ((16, 16), (18, 14), (14, 18))
GUIDANCE, SUBSTEPS = 2.0, 3


class Pass:
    """One model, two roles.

    The student is turbo with a LoRA that trains, the teacher carries the adapter and the LoRA as it was.
    """

    def __init__(self, dit, state: dict, captions: list[str], device):
        from zturbo import lorafile, lowrank
        from zturbo.hosts import comfy_adapter, comfy_tiny
        from zturbo.hosts.comfy_lend import fetchers

        self.dit, self.device, self.lowrank = dit, device, lowrank
        self.linears, self.targets = fetchers(dit), comfy_adapter.targets(dit)
        self.adapter, self.before = lorafile.read(comfy_tiny.ADAPTER).factors, lorafile.parse(state)[0]
        self.student = {
            name: one.of({key: tensor.float().clone().requires_grad_() for key, tensor in one.tensors.items()})
            for name, one in self.before.items()
        }
        self.features, self.lengths = world.caption_features(comfy_tiny.load_clip(), [*captions, ""])

    def learnt(self) -> dict:
        """The student's parts, without gradients."""
        return {
            name: part.of({key: tensor.detach() for key, tensor in part.tensors.items()})
            for name, part in self.student.items()
        }

    def teaching(self):
        return self.lowrank.attached(self.linears, self.targets, [self.adapter, self.before])

    def learning(self):
        return self.lowrank.attached(self.linears, self.targets, [self.student])

    def captions(self, rows: torch.Tensor):
        return world.refine(self.dit, self.features[rows].to(self.device), self.lengths[rows])

    @torch.no_grad()
    def chord(self, x, place: int, rows):
        """Velocity of the teacher's straight line from x at noise level `place` to the next."""
        with self.teaching():
            caption, empty = self.captions(rows), self.captions(torch.full_like(rows, -1))
            there = world.sample(self.dit, x, caption, empty, world.SIGMAS[place : place + 2], GUIDANCE, SUBSTEPS)
        return (there - x) / (world.SIGMAS[place + 1] - world.SIGMAS[place])

    def start(self, count: int, generator):
        height, width = SHAPES[int(torch.randint(len(SHAPES), (), generator=generator))]
        rows = torch.randint(len(self.features) - 1, (count,), generator=generator)
        return torch.randn(count, 16, height, width, generator=generator).to(self.device), rows

    def train(self, steps: int, batch: int, lr: float, on_policy: bool, seed: int):
        from zturbo.hosts.comfy_forward import velocity

        generator, optimizer = (
            torch.Generator().manual_seed(seed),
            torch.optim.AdamW(self.lowrank.parameters(self.student), lr=lr, weight_decay=0),
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        paths = [] if on_policy else [self.path(generator, batch) for _ in range(40)]
        for step in range(steps):
            if on_policy:
                place = int(torch.randint(8, (), generator=generator))
                x, rows = self.start(batch, generator)
                with torch.no_grad(), self.learning():
                    x = world.sample(self.dit, x, self.captions(rows), sigmas=world.SIGMAS[: place + 1]) if place else x
                goal = self.chord(x, place, rows)
                places = torch.full((batch,), place)
            else:
                states, rows = paths[int(torch.randint(len(paths), (), generator=generator))]
                places, all_rows = torch.randint(8, (batch,), generator=generator), torch.arange(batch)
                x = states[places, all_rows]
                width = torch.tensor([world.SIGMAS[p + 1] - world.SIGMAS[p] for p in places.tolist()])
                goal = (states[places + 1, all_rows] - x) / width[:, None, None, None]
            sigma = torch.tensor(world.SIGMAS)[places].to(self.device)
            with self.learning():
                with torch.no_grad():
                    caption = self.captions(rows)
                loss = (
                    (velocity(self.dit, x.to(self.device), sigma, caption).float() - goal.to(self.device))
                    .square()
                    .mean()
                )
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % 100 == 99:
                log.info("%s step %d loss %.4f", "on policy" if on_policy else "re-distil", step + 1, loss.item())

    @torch.no_grad()
    def path(self, generator, batch: int):
        """(the teacher's states [9, batch, ...] at the eight noise levels and the end, caption rows)."""
        x, rows = self.start(batch, generator)
        states: list[torch.Tensor] = []
        with self.teaching():
            world.sample(
                self.dit,
                x,
                self.captions(rows),
                self.captions(torch.full_like(rows, -1)),
                scale=GUIDANCE,
                substeps=SUBSTEPS,
                path=states,
            )
        return torch.stack(states), rows


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab longrun")
    parser.add_argument("--concepts", default=",".join(concepts.DRAWN))
    parser.add_argument("--seeds", default="0", help="as 0,1,2: of the runs on the adapter")
    parser.add_argument("--after", type=int, default=10000, help="steps of the run on the adapter")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args(argv)
    device = use_comfy()
    import comfy.model_management

    from zturbo import lorafile

    comfy.model_management.in_training = True  # core's fast rotary embedding has no backward
    for seed in map(int, args.seeds.split(",")):
        for concept in args.concepts.split(","):
            file = breakdown.FOLDER / f"{concept}_adapter_{seed}_{args.after:05d}.safetensors"
            todo = [
                kind
                for kind in ("redistil", "onpolicy")
                if breakdown.done(breakdown.FOLDER / f"{concept}_{kind}_{seed}.jsonl") < args.after
            ]
            if not file.is_file() or not todo:
                continue
            judge = measure.Judge(world.load_turbo(device), concept, device)
            captions = [
                path.read_text(encoding="utf-8")
                for path in sorted((breakdown.FOLDER / "pictures" / f"{concept}_{seed}").glob("*.txt"))
            ]
            for kind in todo:
                started, one = time.time(), Pass(judge.dit, load_file(file), captions, device)
                one.train(args.steps, args.batch, args.learning_rate, kind == "onpolicy", seed)
                state = lorafile.state_dict(one.learnt(), torch.bfloat16)
                name = f"{concept}_{kind}_{seed}"
                save_file(state, breakdown.FOLDER / f"{name}_{args.after:05d}.safetensors")
                seconds = round(time.time() - started, 1)
                with breakdown.with_lora(judge.dit, state) as lora:
                    line = {
                        "step": args.after,
                        "pass": args.steps,
                        "seconds": seconds,
                        **judge.measure().rounded(),
                        **judge.watched.read(lora),
                    }
                with open(breakdown.FOLDER / f"{name}.jsonl", "a") as out:
                    out.write(json.dumps(line) + "\n")
                log.info("%s %s", name, {key: value for key, value in line.items() if not isinstance(value, list)})
