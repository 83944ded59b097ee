"""The processes that train one run together: one a card, on one machine or on many.

`accelerate launch` or `torchrun` starts them, each with the same command. Every process has the whole model and the
whole LoRA. Of each batch it takes its share of the rows (`World.share`); gradients and losses are added up over all
processes once a step (`World.sum`), and each takes the same step. The first process (`main`) has the run folder and
the screen, and decides.

They stay together by one rule: all go through the same exchanges in the same order. A process that fails says so at its
next exchange (`tell`), and there the others end too. One that is gone without a word is noticed by the connection that
it closes, or by the time that the others wait.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load

from . import tensorfile
from .errors import TrainingError, ZTurboError, readable

Made = tuple[dict[str, torch.Tensor], dict[str, str]]  # tensors, and facts in words
PATIENCE = 30.0  # minutes that a process waits for the others
ROOM, LONGEST = 8192, 600  # bytes of what a process says in an exchange, and letters of why it failed
FOUND = "zturbo/gone"  # in the store: who is gone
BEAT = 0.5  # seconds between two signs of life
GONE = 3.0  # seconds without one
BACKENDS = {"cuda": "cuda:nccl,cpu:gloo", "xpu": "xpu:xccl,cpu:gloo", "cpu": "gloo"}


class Elsewhere(TrainingError):
    """Another process failed and said so. memory: its device's memory ran out, and it goes on with less."""

    def __init__(self, sentence: str, memory: bool = False):
        super().__init__(sentence)
        self.memory = memory


class Lost(TrainingError):
    """Another process is gone without a word, or this one was told to end."""


class World:
    """One process alone, and what all worlds have. rank: this process's number; size: how many there are."""

    rank, size = 0, 1
    speaks = True  # Is it for this process to say on the screen why the run failed?

    @property
    def main(self) -> bool:
        """Is this the process that has the run folder and the screen?"""
        return self.rank == 0

    def share(self, size: int, turn: int = 0) -> range:
        """This process's rows of a batch of `size`; none where there are fewer rows than processes.

        turn: the batch's number. Processes take turns in having a row more.
        """
        place = (self.rank + turn) % self.size
        return range(size * place // self.size, size * (place + 1) // self.size)

    def sum(self, parameters: list[torch.Tensor], numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Add up the parameters' gradients over all processes, in place, and the numbers (of one element)."""
        return numbers

    def exchange(self, what: str, value: Any = None) -> list:
        """What each process says, by rank. what: the occasion, in a word. Raises Elsewhere or Lost."""
        return [value]

    def agree(self, what: str, value: Any) -> Any:
        """The first process's value."""
        return self.exchange(what, value)[0]

    def from_main(self, make: Callable[[], Made | None]) -> Made | None:
        """What `make` gives in the first process, in all of them. So only that one needs the file that it reads."""
        return make()

    @contextmanager
    def main_first(self, progress: Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
        """The first process goes first; the others wait until it is through. Gives the progress to use within."""
        yield progress

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """Whatever ends one process ends them all, and where none fails, all are through when this is left."""
        yield

    def tell(self, failed: str, memory: bool = False):
        """Tell the others, at their next exchange, that this process failed."""

    def describe(self, rows: int) -> str:
        """For the log, where there are many. rows: of a step."""
        return ""


ALONE = World()


class Many(World):
    """Several processes, in the group that accelerate has made."""

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device
        self.speaks = self.main
        self.over = self.lost = False  # nothing more is exchanged; because someone is gone
        self.ended = threading.Event()
        self.store = torch.distributed.distributed_c10d._get_default_store()
        threading.Thread(target=self._beat, name="zturbo-alive", daemon=True).start()
        signal.signal(signal.SIGTERM, self._told_to_end)
        if not self.main:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers Ctrl-C

    def sum(self, parameters: list[torch.Tensor], numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        self.exchange("sum")  # nobody begins to add up before everybody has something to add
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        pieces = [*gradients, *numbers]
        flat = torch.cat([piece.reshape(-1).to(self.device, torch.float32) for piece in pieces])
        with self._connection():
            torch.distributed.all_reduce(flat)
        summed = flat.split([piece.numel() for piece in pieces])
        for parameter, gradient, total in zip(parameters, gradients, summed):
            parameter.grad = gradient.copy_(total.view_as(gradient))
        return [total.reshape(()).to(one.device) for one, total in zip(numbers, summed[len(parameters) :])]

    def exchange(self, what: str, value: Any = None) -> list:
        found = self._exchange(what, value)
        if any(one[0] != what for one in found):
            self.over = True
            raise Elsewhere(OUT_OF_STEP.format(found=", ".join(one[0] for one in found)))
        return [one[1] for one in found]

    def _exchange(self, what: str, value: Any = None, failed: str = "", memory: bool = False) -> list:
        """[what, value, failed, memory] of each process. failed: why this one did, if so."""
        said = json.dumps([what, value, readable(failed)[:LONGEST], memory]).encode()
        assert len(said) <= ROOM, "what is said is short"
        mine = torch.frombuffer(bytearray(said.ljust(ROOM)), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self._connection():
            torch.distributed.all_gather(every, mine)
        found = [json.loads(one.numpy().tobytes()) for one in every]
        others = [(rank, *one[2:]) for rank, one in enumerate(found) if one[2] and rank != self.rank]
        if bad := next((one for one in others if not one[2]), None):
            self.over = True
            raise Elsewhere(f"Process {bad[0]} of {self.size} (counted from 0) ended: {bad[1].strip()}")
        if others and not failed:
            raise Elsewhere(others[0][1], memory=True)
        return found

    def from_main(self, make: Callable[[], Made | None]) -> Made | None:
        made = make() if self.main else None
        content = bytearray().join(tensorfile.pieces(*made)) if made is not None else bytearray()
        size = self.agree("size", len(content))
        if not size:
            return None
        buffer = torch.frombuffer(content if self.main else bytearray(size), dtype=torch.uint8)
        with self._connection():
            torch.distributed.broadcast(buffer, 0)
        if made is not None:
            return made
        received = buffer.numpy().tobytes()
        return load(received), tensorfile.header(received).get("__metadata__") or {}

    @contextmanager
    def main_first(self, progress: Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
        if not self.main:
            while not self.agree("turn", None):
                pass
            yield progress
            return

        def at_it(done: int, total: int):
            progress(done, total)
            self.exchange("turn", False)  # so that the others' patience begins anew

        yield at_it
        self.exchange("turn", True)

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        try:
            yield
            self.exchange("end")
        except BaseException as error:
            self.tell(str(error) or type(error).__name__)
            raise
        finally:
            self.over = True
            self.ended.set()
            if not self.lost:
                torch.distributed.destroy_process_group()

    def tell(self, failed: str, memory: bool = False):
        if self.over:
            return
        self.over = not memory
        with contextlib.nullcontext() if memory else contextlib.suppress(Elsewhere, Lost):
            self._exchange("failure", failed=failed, memory=memory)

    def describe(self, rows: int) -> str:
        idle = "" if rows >= self.size else IDLE.format(size=self.size)
        return f"{self.size} processes train together: each takes its share of a step's {rows} pictures.{idle}"

    # who is there

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """PyTorch's words for a connection that is closed, or silent for too long, become a sentence."""
        try:
            yield
        except RuntimeError as error:
            raise self._lose(str(error)) from error

    def _told_to_end(self, *_):
        """SIGTERM: launchers send it to the others when one process has ended."""
        if not self.over:
            raise self._lose("this process was told to end, by SIGTERM")

    def _lose(self, why: str) -> Lost:
        self.over = self.lost = True
        gone = self._gone()
        self.speaks = self.rank == min(set(range(self.size)) - set(gone), default=self.rank)
        if gone:
            return Lost(f"Process {', '.join(map(str, gone))} of {self.size} (counted from 0) is gone. {GO_ON}")
        return Lost(f"The {self.size} processes do not train together any more ({why[:300]}). {GO_ON}")

    def _gone(self) -> list[int]:
        """The numbers of the processes that give no sign of life, as the first one that missed them found.

        They are asked through the launcher's store, which ends with the first process's machine.
        """
        try:
            if not self.store.check([FOUND]):
                before = self._beats()
                time.sleep(GONE)
                found = [rank for rank, (old, new) in enumerate(zip(before, self._beats())) if old == new]
                if not self.store.check([FOUND]):
                    self.store.set(FOUND, json.dumps(found))
            return json.loads(self.store.get(FOUND))
        except RuntimeError:
            return [] if self.main else [0]

    def _beats(self) -> list[int]:
        return [self.store.add(f"zturbo/alive/{rank}", 0) for rank in range(self.size)]

    def _beat(self):
        with contextlib.suppress(RuntimeError):
            while not self.ended.wait(BEAT):
                self.store.add(f"zturbo/alive/{self.rank}", 1)


def open_world(device: str = "auto", minutes: float = PATIENCE) -> World:
    """The processes that the launcher has started, of which this is one; ALONE where there is no launcher.

    device: auto or the device's kind. minutes: how long a process waits for the others. Raises ZTurboError.
    """
    size, rank, local = (os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if size in (None, "", "1"):
        return ALONE
    if not all(number and number.isascii() and number.isdecimal() for number in (size, rank, local)):
        raise ZTurboError(NO_LAUNCHER.format(size=size, rank=rank, local=local))
    try:
        from accelerate import PartialState
        from accelerate.utils import check_cuda_p2p_ib_support
    except ImportError as error:
        raise ZTurboError(NO_ACCELERATE.format(size=size, error=error)) from error
    kind = "cpu" if device == "cpu" else next((one for one in BACKENDS if getattr(torch, one).is_available()), "cpu")
    cards = getattr(torch, kind).device_count()
    if kind != "cpu" and int(local or 0) >= cards:
        raise ZTurboError(TOO_MANY.format(local=local, cards=cards))
    if kind == "cuda" and not check_cuda_p2p_ib_support():  # as `accelerate launch` does, for some cards and drivers
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
    try:
        state = PartialState(cpu=kind == "cpu", backend=BACKENDS[kind], timeout=timedelta(minutes=minutes))
    except (RuntimeError, ValueError) as error:
        raise ZTurboError(NOT_MET.format(rank=rank, size=size, error=error)) from error
    return Many(state.process_index, state.num_processes, state.device)


GO_ON = "Start the same command again: it goes on from the newest checkpoint."
OUT_OF_STEP = (
    "The processes do not do the same any more ({found}). This is a fault of the program: please report it. "
    "The same command goes on from the newest checkpoint."
)
IDLE = (
    " There are fewer of them than processes, so some have nothing to do: "
    "let batch_size, or batch_size times accumulation, be at least {size}."
)
NO_LAUNCHER = (
    "WORLD_SIZE is {size}, RANK {rank} and LOCAL_RANK {local}: a run on many cards needs all three. "
    "Start it by `accelerate launch` or `torchrun`, or clear WORLD_SIZE."
)
NO_ACCELERATE = (
    "{size} processes are to train together, which needs the package accelerate ({error}). "
    "Install it (pip install accelerate), or start one process without a launcher."
)
NOT_MET = (
    "Process {rank} of {size} (counted from 0) does not reach the others ({error}). "
    "Give every machine the same --master_addr and --master_port, which a firewall must let through."
)
TOO_MANY = (
    "This is process {local} of this machine (counted from 0), which has {cards} cards. "
    "Start as many processes as there are cards."
)
