"""Another engine with fewer of torch's threads: small steps are over before a second thread has begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError
from fedml_core.messages import Arrived, Assignment
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.sequential import Sequential

__all__ = ["Threaded"]


@dataclass(frozen=True, kw_only=True)
class Threaded(Engine):
    """Runs another engine in this process with so many of torch's threads, at most.

    `threads`: >= 1; on a CPU, 1 is often enough, and leaves the other processors alone. `inner`: what is run.
    """

    threads: int = 1
    inner: Engine = field(default_factory=Sequential)
    name: ClassVar[str] = "threaded"
    protects_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the threads."""
        require_whole("threads", self.threads, at_least=1)
        if isinstance(self.inner, Threaded) or hasattr(self.inner, "workers"):
            raise ConfigError(f"the threads of {self.inner.name} are its own business; give another engine as inner")

    def open(self, stage: Stage) -> Session:
        """Return a session of the inner engine that computes with these threads."""
        inner = dataclasses.replace(self.inner, skip_failures=self.skip_failures)
        return FewThreads(inner.open(stage), self.threads)


class FewThreads(Session):
    """Lets a session compute with few threads; whoever takes its replies has all of them."""

    def __init__(self, session: Session, threads: int) -> None:
        self._session, self._threads = session, threads

    def run(self, assignment: Assignment, cohort: Sequence[int]) -> Iterator[Arrived]:
        """Yield the replies of the session inside."""
        replies = iter(self._session.run(assignment, cohort))
        while True:
            with _threads_at_most(self._threads):
                reply = next(replies, None)
            if reply is None:
                return
            yield reply

    def close(self) -> None:
        """Close the session inside."""
        self._session.close()


@contextmanager
def _threads_at_most(most: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
