"""Phases of a run: what is said of them, and that another objective is a class and no edit elsewhere."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from test_trainer import PICTURES, LinearHost, Nobody, go, recipe

from zturbo import phases, runlog, trainer
from zturbo.batches import pictures_of
from zturbo.objectives import FlowMatching, Penalty, Split
from zturbo.plan import Phase, PlannedPhase
from zturbo.recipe import Data, Previews, Turbo
from zturbo.roles import PHASES
from zturbo.runfolder import RunFolder

SMALL = Turbo(size=64, every=5)


def restoring():
    """Four steps that learn, and five that restore."""
    return recipe(steps=9, turbo=replace(SMALL, keep="restore", restore_steps=5, restore_prompts=("x",)))


def order(said) -> list[str]:
    """The names, each once where it is said several times in a row."""
    names = [name for name, _, _ in said]
    return [name for before, name in zip([None, *names], names) if name != before]


def test_phases_are_said_in_their_order_with_progress(tmp_path):
    given = replace(restoring(), previews=Previews(("a",), every=8))
    _, _, _, control = go(tmp_path, given)
    said = control.phases
    assert order(said) == [
        *("encoding", "walking", "training", "walking", "restoring"),
        *("drawing", "restoring", "drawing", "saving"),
    ]
    assert set(order(said)) <= set(PHASES)
    assert [one for one in said if one[0] == "training"] == [("training", 0, 9)]
    assert [one for one in said if one[0] == "restoring"] == [("restoring", 4, 9), ("restoring", 8, 9)]
    captions = len(PICTURES.captions().texts)
    first = [one for one in said if one[0] == "walking" and one[2] == 24]
    assert first == [("walking", n, 24) for n in range(24)]  # eight prompts, three states each
    second = [one for one in said if one[0] == "walking" and one[2] != 24]
    assert second == [("walking", n, 8 * (captions + 1 + 24)) for n in range(8 * (captions + 1 + 24))]


@pytest.mark.parametrize("phase", ["encoding", "walking", "training"])
def test_a_cancel_is_noticed_in_every_phase_that_takes_long(tmp_path, phase):
    class Leaving(Nobody):
        def check(self):
            if getattr(self, "phases", [])[-1:] and self.phases[-1][0] == phase:
                raise KeyboardInterrupt

    given = recipe(steps=5, turbo=replace(SMALL, every=1))
    host, control = LinearHost(), Leaving()
    host.encode = lambda _dataset, _captions, progress: [progress(n, 2) for n in range(2)] and encoded(host)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, PICTURES, host, RunFolder.new(tmp_path, given), control, {})
    assert control.phases[-1][0] == phase and control.steps < 5


def encoded(host):
    return LinearHost.encode(host, None, None, lambda *_: None)


@dataclass(frozen=True)
class Distillation:
    """On-policy, as small as it can be: at states that the model walks to, its velocity is brought to a teacher's."""

    teacher: torch.Tensor  # [16, 16]

    def losses(self, index, velocity, split):
        x = torch.randn(4, 16, 2, 2, generator=torch.Generator().manual_seed(index))
        sigma = torch.ones(4)
        with torch.no_grad():
            x = x - 0.5 * velocity(x, sigma, (0,) * 4, 1.0)
        target = torch.einsum("oc,bchw->bohw", self.teacher, x)
        for rows in split.rows(4):
            v = velocity(x[rows], sigma[rows], (0,) * len(x[rows]), 1.0)
            yield (v - target[rows]).square().mean(dim=(1, 2, 3)).sum() / 4, sigma[rows]


def distilling(teacher):
    def begin(session):
        return Phase(Distillation(teacher), lambda step: session.recipe.optimizer.learning_rate)

    return begin


def test_another_objective_is_a_class_and_an_entry_in_the_plan(tmp_path):
    """It trains, is logged, saved and taken up again as the others are."""
    teacher = LinearHost().linear.weight.detach() + 0.02 * torch.randn(
        16, 16, generator=torch.Generator().manual_seed(9)
    )
    given = recipe(steps=60, turbo=replace(SMALL, every=20))
    plan = (PlannedPhase("training", 60, distilling(teacher)),)

    def run(folder, control):
        return trainer.train(given, PICTURES, LinearHost(), folder, control, {}, plan)

    whole = run(RunFolder.new(tmp_path, given), Nobody())
    assert sum(whole.losses[-10:]) < 0.5 * sum(whole.losses[:10])
    folder = RunFolder.new(tmp_path, given)
    with pytest.raises(KeyboardInterrupt):
        run(folder, Nobody(cancel_after=23))
    again = run(RunFolder(folder.path), Nobody())
    assert again.losses == whole.losses and all(torch.equal(again.state[key], whole.state[key]) for key in whole.state)
    assert [event["step"] for event in runlog.read_events(folder.events) if "loss" in event] == list(range(1, 61))
    assert all(torch.equal(load_file(folder.lora)[key], whole.state[key]) for key in whole.state)


def test_two_objectives_follow_each_other_and_one_may_be_a_penalty(tmp_path):
    """Pictures first, with the other objective as a penalty every other step; then that one alone."""
    teacher = LinearHost().linear.weight.detach()

    def learning(session):
        return replace(phases.learning(session), penalties=(Penalty("drift", Distillation(teacher), 2.0, 2),))

    given = recipe(steps=20)
    plan = (PlannedPhase("training", 10, learning), PlannedPhase("distilling", 20, distilling(teacher)))
    control, run = Nobody(), RunFolder.new(tmp_path, given)
    result = trainer.train(given, PICTURES, LinearHost(), run, control, {}, plan)
    steps = [event for event in runlog.read_events(run.events) if "loss" in event]
    assert ["drift" in event for event in steps] == [True, False] * 5 + [False] * 10
    assert [name for name, _, _ in control.phases if name in ("training", "distilling")] == ["training", "distilling"]
    plain = trainer.train(replace(given, steps=1), PICTURES, LinearHost(), RunFolder.new(tmp_path, given), Nobody(), {})
    assert result.losses[0] == plain.losses[0]  # a penalty is not in the loss that is logged


def test_micro_batches_are_the_batch():
    assert Split().rows(5) == [slice(0, 5)]
    assert Split(at_once=2).rows(5) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_the_objective_of_the_pictures_is_a_function_of_its_index(tmp_path):
    """Whatever was asked for before; in micro-batches it is the same but for rounding."""
    given, host = recipe(steps=4, batch_size=3), LinearHost()
    pictures = pictures_of(given, PICTURES, host)
    objective = FlowMatching(given, pictures, host)
    with host.training({}) as velocity:
        wanted = [float(sum(loss for loss, _ in objective.losses(n, velocity, Split()))) for n in range(4)]
        assert [float(sum(loss for loss, _ in objective.losses(n, velocity, Split()))) for n in (3, 1)] == [
            wanted[3],
            wanted[1],
        ]
        for n in range(4):
            pieces = [loss for loss, _ in objective.losses(n, velocity, Split(1))]
            assert len(pieces) == 3 and float(sum(pieces)) == pytest.approx(wanted[n], rel=1e-5)


def test_restoring_may_come_behind_any_phase_and_goes_on_after_a_cut(tmp_path):
    teacher, given = LinearHost().linear.weight.detach(), replace(restoring(), steps=12)
    plan = (
        PlannedPhase("training", 4, phases.learning),
        PlannedPhase("distilling", 7, distilling(teacher)),
        PlannedPhase("restoring", 12, phases.restoring),
    )

    def run(folder, control):
        return trainer.train(given, PICTURES, LinearHost(), folder, control, {}, plan)

    control = Nobody()
    whole = run(RunFolder.new(tmp_path, given), control)
    assert order(control.phases)[-4:] == ["distilling", "walking", "restoring", "saving"]
    folder = RunFolder.new(tmp_path, given)
    with pytest.raises(KeyboardInterrupt):
        run(folder, Nobody(cancel_after=9))
    again = run(RunFolder(folder.path), Nobody())
    assert again.losses == whole.losses and all(torch.equal(again.state[key], whole.state[key]) for key in whole.state)


LOOK = 30  # calls of the velocity in a validation: two pictures held out and four trained, at five noise levels


def validated(folder, host):
    """Two steps, with a validation before the first and one after the second, and a preview at the end."""
    data = Data(caption_dropout=0, validation=0.4, validation_every=2)
    given = recipe(steps=2, data=data, turbo=Turbo(every=0), previews=Previews(("a",), every=0))
    run, control = RunFolder.new(folder, given), Nobody()
    result = trainer.train(given, replace(PICTURES, options=data), host, run, control, {})
    looks = [event["step"] for event in runlog.read_events(run.events) if event.get("event") == "validation"]
    return result, control, looks


class Full(LinearHost):
    """Has no memory left in one call of its velocity."""

    calls, full_at, frugal, saves_memory = 0, 0, False, False

    def save_memory(self):
        self.saves_memory = True
        return "less of everything"

    @contextmanager
    def training(self, lora):
        with super().training(lora) as velocity:

            def counted(*given):
                self.calls += 1
                if self.calls == self.full_at:
                    raise MemoryError
                return velocity(*given)

            yield counted


def test_memory_that_runs_out_beside_the_last_step_costs_no_final_preview(tmp_path):
    plain, control, looks = validated(tmp_path, Full())
    assert looks == [0, 2] and control.previews == [2]
    host = Full()
    host.full_at = LOOK + 2 + LOOK  # the last call
    result, control, looks = validated(tmp_path, host)
    assert host.calls == host.full_at and host.saves_memory and looks == [0]
    assert result.losses == plain.losses and control.previews == [2] and len(result.images) == 1


def test_a_run_that_goes_back_to_its_beginning_keeps_its_first_validation(tmp_path):
    host = LinearHost()
    host.fail_at = (LOOK + 1,)  # in the first step
    _, control, looks = validated(tmp_path, host)
    assert any("Going back to step 0" in sentence for sentence in control.said) and looks == [0, 2]
