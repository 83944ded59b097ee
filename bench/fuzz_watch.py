"""What an input of `bench fuzz` may do: the folders it has, the seconds and the memory, and who looks."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
UNFOLLOWED = getattr(os, "O_NOFOLLOW", 0) | os.O_EXCL  # with these, a link is not followed
CHANGING = (
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
)
READING = ("os.listdir", "os.scandir")
RUNNING = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "socket.connect",
    "socket.bind",
    "pickle.find_class",
)


class Hang(BaseException):
    """Too many seconds. No Exception, so that nobody takes it for a damaged file."""


@dataclass(frozen=True)
class Damaged:
    """what: the damage, for people. feed: gives it to the pack, and raises AssertionError for a wrong result."""

    what: str
    feed: Callable[[], object]


@dataclass(frozen=True)
class Place:
    """ComfyUI's folders under `base`, and a ring of canaries around them."""

    base: Path

    @property
    def input(self) -> Path:
        return self.base / "input"

    @property
    def output(self) -> Path:
        return self.base / "output"

    @property
    def temp(self) -> Path:
        return self.base / "temp"

    @property
    def loras(self) -> Path:
        return self.base / "models" / "loras"

    @property
    def runs(self) -> Path:
        return self.output / "zturbo"

    @property
    def allowed(self) -> tuple[Path, ...]:
        return self.input, self.output, self.temp, self.loras, self.drive

    @property
    def drive(self) -> Path:
        """Another drive of the owner's, to which links in ComfyUI's folders may lead."""
        return self.base / "drive"

    @property
    def outside(self) -> Path:
        return self.base / "outside"

    def make(self):
        """The folders and the canaries. Some stand where a careless comparison of names would let them in."""
        for folder in (
            *self.allowed,
            *(self.outside / name for name in ("pictures", "run/checkpoints", "run/previews")),
            self.base / "input_old",
            self.base / "models" / "loras2",
        ):
            folder.mkdir(parents=True)
        for name in (
            "secret.txt",
            "outside/secret.txt",
            "outside/run/events.jsonl",
            "outside/run/recipe.toml",
            "input_old/a.txt",
            "models/secret.txt",
            "models/loras2/a.txt",
            "outside/pictures/a.txt",
        ):
            (self.base / name).write_text("a canary\n", encoding="utf-8")

    def clear(self):
        """What the last input left in ComfyUI's folders goes."""
        for folder in self.allowed:
            for entry in os.scandir(folder):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def ring(self) -> dict[str, tuple[int, int]]:
        """Size and time of everything that is not ComfyUI's."""
        found, kept = {}, set(map(str, self.allowed))
        for folder, folders, names in os.walk(self.base):
            folders[:] = [name for name in folders if os.path.join(folder, name) not in kept]
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                stat = os.lstat(path)
                found[path] = (stat.st_size, stat.st_mtime_ns)
        return found


class Watch:
    """While open, notes every file that is touched outside the allowed folders. Code and its data may be read."""

    def __init__(self, place: Place):
        self.place, self.found, self.open = place, [], False
        self.allowed = tuple(map(str, place.allowed))
        own = Path(__file__).resolve().parents[1]
        code = (sys.prefix, sys.base_prefix, own, *sys.path, "/proc/self", "/dev")
        folders = {os.path.realpath(path) for path in code if path and os.path.isdir(path)}
        self.code = (*folders, "/proc/meminfo")  # the latter: how much memory is free
        self.before = place.ring()
        sys.addaudithook(self._hook)  # stays for the life of the process, and sleeps when not open

    def __enter__(self):
        self.found, self.open = [], True

    def __exit__(self, *_):
        self.open = False

    def taken(self) -> list[str]:
        """What was touched that should not have been, since the last opening."""
        now, before = self.place.ring(), self.before
        self.before = now
        return [
            *dict.fromkeys(self.found),
            *(f"{path} was changed" for path in before.keys() | now.keys() if before.get(path) != now.get(path)),
        ]

    def _hook(self, event: str, arguments: tuple):
        if not self.open:
            return
        self.open = False  # looking is no trespass
        try:
            self.found += [f"{event} {path!r}" for path in self._wrong(event, arguments)]
        finally:
            self.open = True

    def _wrong(self, event: str, arguments: tuple) -> list:
        if event in RUNNING:
            return [arguments[:1]]
        if event == "open":
            path, _, flags = arguments
            writes, real = flags & WRITING, self._entry(path) if flags & UNFOLLOWED else self._target(path)
            return [] if inside(real, self.allowed) or (not writes and inside(real, self.code)) else [path]
        if event in READING:
            return [path for path in arguments[:1] if not inside(self._target(path), (*self.allowed, *self.code))]
        if event in CHANGING:
            if event in ("os.rename", "os.link"):
                paths = arguments[:2]
            else:
                paths = arguments[1:2] if event == "os.symlink" else arguments[:1]
            return [path for path in paths if not inside(self._entry(path), self.allowed)]
        return []

    @staticmethod
    def _target(path) -> str | None:
        """Where a path leads, or None for what is no path."""
        return None if isinstance(path, int) or path is None else os.path.realpath(os.fsdecode(path))

    def _entry(self, path) -> str | None:
        """Where the entry itself stands, be it a link or not."""
        if isinstance(path, int) or path is None:
            return None
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        return os.path.join(os.path.realpath(folder), name)


def inside(path: str | None, roots: tuple[str, ...]) -> bool:
    return path is None or any(path == root or path.startswith(root + os.sep) for root in roots)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises Hang after so many seconds."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def ring(*_):
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded(gigabytes: float) -> Iterator[None]:
    """No more addresses than so many beyond those of now: MemoryError instead of a machine that stands still.

    Only where the system can.
    """
    try:
        import resource

        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + int(gigabytes * 1e9), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def most_memory() -> float:
    """MB of this process at its fullest; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
