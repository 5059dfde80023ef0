"""Another engine in a process that is set up for it: how many threads torch has, and whether freed memory is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError
from fedml_core.freed_memory import freed_memory_kept, why_not_kept
from fedml_core.messages import Arrived, Assignment
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.sequential import Sequential

__all__ = ["Tuned"]


@dataclass(frozen=True, kw_only=True)
class Tuned(Engine):
    """Runs another engine in this process with so many of torch's threads, or keeping the memory that it frees.

    `threads`: >= 1, of torch, at most, or None for as many as there are; on a CPU, 1 is often enough, and leaves the
    other processors alone. `keep_freed_memory`: until the session is closed, memory that this process frees stays with
    it (Linux with glibc; elsewhere that is said and nothing happens). `inner`: what is run; the memory layout of a
    model is an argument of `sequential`.
    """

    threads: int | None = None
    keep_freed_memory: bool = False
    inner: Engine = field(default_factory=Sequential)
    name: ClassVar[str] = "tuned"
    protects_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that there is something to set up, and whether that is possible."""
        if self.threads is not None:
            require_whole("threads", self.threads, at_least=1)
        if not isinstance(self.keep_freed_memory, bool):
            raise ConfigError(f"keep_freed_memory must be true or false, got {self.keep_freed_memory!r}")
        if self.threads is None and not self.keep_freed_memory:
            raise ConfigError(f"tuned sets up nothing; give it threads or keep_freed_memory, or say {self.inner.name}")
        if isinstance(self.inner, Tuned) or hasattr(self.inner, "workers"):
            raise ConfigError(f"{self.inner.name} sees to threads and memory itself; give another engine as inner")

    def open(self, stage: Stage) -> Session:
        """Return a session of the inner engine in a process that is set up for it."""
        inner = dataclasses.replace(self.inner, skip_failures=self.skip_failures)
        with ExitStack() as held:
            if self.keep_freed_memory:
                why_not = why_not_kept()
                if why_not is None:
                    held.enter_context(freed_memory_kept())
                else:
                    stage.tell(f"freed memory is not kept, which costs nothing but time: {why_not}")
            session = inner.open(stage)
            held.callback(session.close)
            return TunedSession(session, self.threads, held.pop_all())


class TunedSession(Session):
    """Lets a session compute with few threads; whoever takes its replies has all of them. `held`: closed at its end."""

    def __init__(self, session: Session, threads: int | None, held: ExitStack) -> None:
        self._session, self._threads, self._held = session, threads, held

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
        """Close the session inside, and leave the process as it was."""
        self._held.close()


@contextmanager
def _threads_at_most(most: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if most is None or most >= before:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)
