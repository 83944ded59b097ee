"""Files written by a thread while training goes on: one job at a time, in order, each whole before the next begins."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """A queue of one. `submit` hands over a job and returns.

    It waits only for the job before, where that is not done: so jobs end in order.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "zturbo-writer")
        self._job: Future | None = None

    def submit(self, job: Callable[[], None]):
        self.wait()
        self._job = self._pool.submit(job)

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def wait(self):
        """Until everything is written. Raises what a job raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()
