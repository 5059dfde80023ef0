"""What a server asks a site to train, and what can be read from it: noise, bounds, the names of transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedml_core.privacy.adaptive_clip import ClipByQuantile
from fedml_core.privacy.events import Mechanism, Term, fold
from fedml_core.training import Training
from fedml_core.transform import Chain, State, Transform

__all__ = [
    "AT_SERVER",
    "LOCAL",
    "SUMS",
    "Asked",
    "Event",
    "Sum",
    "clip_norm",
    "mechanisms",
    "multiplier",
    "parts",
    "update_norm",
]

Event = Mapping[str, Any]

SUMS = ("discrete-gaussian-sum", "skellam-sum")
"""Events of noise that the members of a sum add together."""
AT_SERVER = ("gaussian", "laplace", "tree", "matrix")
"""Events of noise that the server adds."""
LOCAL = "analytic-gaussian-local"
"""The event of noise that a site adds to its own update."""


@dataclass(frozen=True)
class Sum:
    """The secure sum that an update goes into.

    `honest`: the fewest members in it that do not collude. `metrics`: the names of what it sums beside the update.
    """

    honest: int
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a server asks a site to train, as the site sees it.

    `server`: HOST:PORT. `secure`: the sum that it goes into, or None in the clear. `promised`: the event that the
    server says it makes of the round. `example`: whether the site's own training protects examples. `participation`:
    how often the site has trained in this run, this time included.
    """

    run: str
    server: str
    round: int
    training: Training
    pipeline: Transform
    told: State = field(default_factory=dict, repr=False)
    secure: Sum | None = None
    promised: Event | None = None
    example: bool = False
    participation: int = 1

    @property
    def own_event(self) -> Event | None:
        """Return what the site's own half of the pipeline does, in an accountant's words."""
        return self.pipeline.event()


def mechanisms(event: Event | None) -> Iterator[tuple[Term, Mechanism]]:
    """Yield every mechanism in an event, with the sample that it answers from.

    Raises: PrivacyError: for an event that is none.
    """
    for term in fold([event] if event is not None else []):
        for part, _ in term.parts:
            yield term, part


def multiplier(part: Mechanism) -> float:
    """Return a mechanism's noise over the bound on one unit's influence."""
    if part.name in SUMS:
        return part["local_noise"] * math.sqrt(part["clients"]) / part["l2"]
    return part["scale"] if part.name == "laplace" else part["noise_multiplier"]


def update_norm(asked: Asked) -> float:
    """Return how long the update can be in parameter units: what is told counts only where a transform clips to it."""
    bound = asked.pipeline.l2_bound(math.inf)
    places = asked.pipeline.parts if isinstance(asked.pipeline, Chain) else (asked.pipeline,)
    adaptive = [part for part in parts(asked.pipeline) if isinstance(part, ClipByQuantile)]
    for place, part in enumerate(places):
        if isinstance(part, ClipByQuantile):
            told = asked.told.get(str(place), {}).get("clip_norm", math.inf)
            return float(told) * bound / part.l2_bound(math.inf)
    return math.inf if adaptive else bound


def clip_norm(asked: Asked) -> float:
    """Return to what the update is clipped before noise lengthens it again, by the fields of the transforms."""
    return min([math.inf, *(float(getattr(part, "clip_norm", math.inf)) for part in parts(asked.pipeline))])


def parts(pipeline: Transform) -> Iterator[Transform]:
    """Yield a pipeline's transforms; empty chains, which stand for the server's halves, are none."""
    if isinstance(pipeline, Chain):
        for part in pipeline.parts:
            yield from parts(part)
    else:
        yield pipeline
