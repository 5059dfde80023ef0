"""What one client contributes, and what many contributions add up to. Nothing else ever reaches a sum."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedml_core.errors import ReplyError

MAX_SUMS = 64
"""How many facts about itself one client may report."""

_SUM_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_SUM_NAMES = ("values", "weight")  # what else an update is made of


@dataclass(frozen=True)
class Update:
    """One client's contribution (or K clients', along a leading dimension).

    `values`: float32, (..., d): what to ADD to the global model, then whatever the pipeline made of it.
    `weight`: float64, (...): what the sum will be divided by; 1 where the mean is uniform.
    `sums`: float64, (...) each: additive facts that leave the client (examples, summed loss, ...); see `check_sums`.
    `facts`: float64, (...) each: what local training did (steps, step_size), for client halves; stays at the client.
    """

    values: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    sums: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    facts: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, values: Tensor, weight: float = 1.0, /, **sums: float) -> Update:
        """Return one client's update from plain numbers.

        Example:
            >>> Update.of(torch.ones(3), 10, examples=10).weight.item()
            10.0
        """
        scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        return cls(values, torch.tensor(weight, dtype=torch.float64), scalars)

    @property
    def lead(self) -> torch.Size:
        """Return the leading dimensions: () for one client, (K,) for K."""
        return self.values.shape[:-1]

    def replace(self, **changes: object) -> Update:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # the caller's types are checked by mypy's dataclass plugin where they are built

    def row(self, place: int) -> Update:
        """Return the update of one of K clients."""
        return Update(
            self.values[place],
            self.weight[place],
            {name: value[place] for name, value in self.sums.items()},
            {name: value[place] for name, value in self.facts.items()},
        )

    def outgoing(self) -> Update:
        """Return the part that leaves the client: without `facts`."""
        return self.replace(facts={})


@dataclass(frozen=True)
class Total:
    """The sum of `count` updates, and on its way through `decode` the step that it becomes.

    `values`: float32, (d,); `weight`: the summed weights; `sums`: the summed facts; `count`: contributions. `facts`:
    what taking the sum itself reported, such as how many coordinates a secure sum clipped.
    """

    values: Tensor = field(repr=False)
    weight: float
    count: int
    sums: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict, repr=False)

    def replace(self, **changes: object) -> Total:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # as in Update.replace


def check_update(update: Update, size: int, max_weight: float) -> None:
    """Refuse an update (of one client or of K) that must not reach a sum.

    Guarantees: on return the values are float32 of shape (..., size), finite, each weight is finite and in
    (0, max_weight], and the sums are finite and few, with names that `check_sums` lets pass.
    Raises: ReplyError: with rule `shape`, `dtype`, `metrics`, `non-finite` or `weight`.
    """
    check_sums(update.sums)
    if update.values.shape[-1:] != (size,):
        raise ReplyError("shape", f"values must have shape (..., {size}), got {tuple(update.values.shape)}")
    if update.values.dtype != torch.float32:
        raise ReplyError("dtype", f"values must be float32, got {str(update.values.dtype).removeprefix('torch.')}")
    if update.weight.shape != update.lead or any(s.shape != update.lead for s in update.sums.values()):
        raise ReplyError("shape", f"weight and sums must have the leading shape {tuple(update.lead)} of the values")
    if not all_finite(update.values) or any(not all_finite(s) for s in update.sums.values()):
        raise ReplyError("non-finite", "values or sums hold NaN or infinity; the client's training diverged")
    if not bool(((update.weight > 0) & (update.weight <= max_weight) & torch.isfinite(update.weight)).all()):
        shown = float(update.weight) if update.weight.dim() == 0 else "one"
        raise ReplyError("weight", f"a weight must be > 0 and <= {max_weight:g}, got {shown}")


def check_sums(names: Iterable[str]) -> None:
    """Refuse a client's report by the names of its sums: they become keys, columns and lines of text.

    Raises: ReplyError: with rule `metrics`, if there are more than 64, or `flaw_in_name` finds one.
    """
    names = list(names)
    if len(names) > MAX_SUMS:
        raise ReplyError("metrics", f"a reply may report at most {MAX_SUMS} sums, got {len(names)}")
    for name in names:
        if flaw := flaw_in_name(name):
            raise ReplyError("metrics", f"a sum may not be called {name!r:.80}: {flaw}")


def flaw_in_name(name: str) -> str | None:
    """Return why no sum or metric may be called so, or None if it may.

    Example:
        >>> flaw_in_name("top-5.accuracy"), flaw_in_name("top 5")
        (None, 'a name is 1 to 64 letters a to z, digits, _, - or .')
    """
    if not isinstance(name, str) or not _SUM_NAME.fullmatch(name):
        return "a name is 1 to 64 letters a to z, digits, _, - or ."
    return "the name is taken by a part of every update" if name in _NO_SUM_NAMES else None


def all_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite, in one pass and without a mask in the usual case."""
    # A finite sum proves it: NaN and infinity survive addition. A sum that overflowed is looked at closely.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
