"""What a site has done in a run so far: how often, for how long, what it measured, and what travelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SiteTally"]


class SiteTally:
    """Counts a site's work; `counts`: how often it trained, evaluated and failed."""

    def __init__(self) -> None:
        self.counts = {"trained": 0, "evaluated": 0, "failed": 0}
        self._bytes = {"bytes_up": 0, "bytes_down": 0}
        self._metrics: dict[str, Mapping[str, float]] = {}
        self._seconds = 0.0

    @property
    def summary(self) -> Mapping[str, Any]:
        """Return it under the names that every run's summary has; bytes are message bodies, seconds those of work."""
        return {
            "rounds": self.counts["trained"],
            "metrics": self._metrics,
            "seconds": round(self._seconds, 3),
            **self._bytes,
        }

    def failed(self) -> None:
        """Count what could not be answered."""
        self.counts["failed"] += 1

    def carried(self, bytes_down: int, bytes_up: int) -> None:
        """Count a message and its answer."""
        self._bytes["bytes_down"] += bytes_down
        self._bytes["bytes_up"] += bytes_up

    def worked(self, seconds: float, *, trained: bool = False) -> None:
        """Count work in a secure sum, of which nothing but its time is known."""
        self._seconds += seconds
        self.counts["trained"] += trained

    def measured(self, done: str, sums: Mapping[str, float], seconds: float) -> str:
        """Count a training or an evaluation with its sums over examples, and return in words what they come to."""
        examples = sums.get("examples", 0.0)
        means = {name: value / examples for name, value in sums.items() if name != "examples"} if examples > 0 else {}
        self.counts[done] += 1
        self._seconds += seconds
        self._metrics["train" if done == "trained" else "clients"] = {"examples": examples, **means}
        shown = "".join(f", {name} {value:.4f}" for name, value in means.items())
        return f"{done} on {examples:g} examples in {seconds:.1f} s{shown}"
