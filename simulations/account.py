"""What `fedveil account` answers: what noise costs, or how much noise a promise takes, without a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_core.console import Console
from fedml_core.errors import ConfigError
from fedml_core.privacy.accounting import Claim, epsilon_of
from fedml_core.privacy.calibration import noise_for

__all__ = ["MECHANISMS", "Question", "answer"]

Event = Mapping[str, Any]

MECHANISMS = ("gaussian", "laplace", "local", "tree", "matrix")
"""What `--mechanism` takes; everything else comes from a file of events."""


@dataclass(frozen=True)
class Question:
    """What the command line asks. `steps`: how often; those of one tree, or the rounds of all others.

    `events`: a JSON file with a list of events instead. `target`: the epsilon to find the noise for.
    """

    delta: float
    unit: str
    adjacency: str | None
    mechanism: str = "gaussian"
    noise_multiplier: float | None = None
    target: float | None = None
    steps: int = 1
    sampling_rate: float | None = None
    population: int | None = None
    sample: int | None = None
    sensitivity: float | None = None
    restarts: int | None = None
    events: Path | None = None

    def __post_init__(self) -> None:
        """Check that one question is asked."""
        given = [self.noise_multiplier is not None, self.target is not None, self.events is not None]
        if sum(given) != 1:
            raise ConfigError(
                "ask with exactly one of --noise-multiplier, --target-epsilon and --events; "
                f"{sum(given)} of them were given"
            )
        for name in ("noise_multiplier", "target", "sampling_rate", "sensitivity"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                option = "target-epsilon" if name == "target" else name.replace("_", "-")
                raise ConfigError(f"--{option} must be a finite number, got {value}")
        if self.steps < 1:
            raise ConfigError(f"--steps must be >= 1, got {self.steps}")
        if self.mechanism not in MECHANISMS:
            raise ConfigError(f"--mechanism must be one of {', '.join(MECHANISMS)}, got {self.mechanism!r}")
        if self.sample is not None and (self.population is None or self.sampling_rate is not None):
            raise ConfigError("--sample-size needs --population and no --sampling-rate; give those of one scheme")
        for name, wanted in (("sensitivity", "matrix"), ("restarts", "tree")):
            if getattr(self, name) is not None and self.mechanism != wanted:
                raise ConfigError(f"--{name} belongs to --mechanism {wanted}, got {self.mechanism}; leave it out")

    @property
    def neighbours(self) -> str:
        """Return the adjacency: as asked, or the one that the mechanism and the sampling have."""
        if self.adjacency is not None:
            return self.adjacency
        if self.sample is not None or self.mechanism == "local":
            return "replace-one"
        return "replace-special" if self.mechanism in ("tree", "matrix") else "add-or-remove-one"

    def made(self, noise_multiplier: float) -> list[Event]:
        """Return the events with this much noise."""
        once = self._once(noise_multiplier)
        if self.sampling_rate is not None:
            once = {"name": "poisson", "sampling_probability": self.sampling_rate, "event": once}
        if self.sample is not None:
            once = {"name": "fixed-size", "population": self.population, "sample": self.sample, "event": once}
        return [{"name": "repeated", "count": 1 if self.mechanism in ("tree", "matrix") else self.steps, "event": once}]

    def _once(self, noise: float) -> dict[str, Any]:
        if self.mechanism == "laplace":
            return {"name": "laplace", "scale": noise}
        if self.mechanism == "local":
            return {"name": "analytic-gaussian-local", "noise_multiplier": noise}
        if self.mechanism == "tree":
            return {"name": "tree", "noise_multiplier": noise, "steps": self.steps, "restarts": self.restarts or 0}
        if self.mechanism == "matrix":
            if self.sensitivity is None:
                raise ConfigError("--mechanism matrix needs --sensitivity, of the whole run over one unit's bound")
            return {"name": "matrix", "noise_multiplier": noise, "sensitivity": self.sensitivity}
        return {"name": "gaussian", "noise_multiplier": noise}


def answer(console: Console, question: Question) -> Claim:
    """Say what the events cost, or the noise that a target takes, and return the claim."""
    noise = question.noise_multiplier
    if question.target is not None:
        noise = noise_for(
            question.target, question.delta, question.made, unit=question.unit, adjacency=question.neighbours
        )
    events = read_events(question.events) if question.events else question.made(noise or 0.0)
    claim = epsilon_of(
        events,
        delta=question.delta,
        unit=question.unit,
        adjacency=question.neighbours,
        population=question.population,
    )
    if question.target is not None:
        console.say(f"noise multiplier {noise:.6g}")
    console.say(f"{claim}")
    for note in claim.notes:
        console.note(f"note: {note}")
    known = {} if noise is None else {"noise_multiplier": noise}
    console.result({**known, **claim.to_json()})
    return claim


def read_events(path: Path) -> Sequence[Event]:
    """Return the list of events in a JSON file.

    Raises: ConfigError: if it cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}; write a list of events") from None
    if not isinstance(found, list):
        raise ConfigError(f"{path} must hold a list of events, got a {type(found).__name__}")
    return found
