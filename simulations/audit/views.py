"""What a server saw: one client's update as it left the client, as a masked vector, within a sum, or in a release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedml_core.model import ModelSpec
from fedml_core.transform import Draws
from fedml_core.update import Update
from strategies.strategy import Strategy

__all__ = ["View", "views_of"]


@dataclass(frozen=True)
class View:
    """One thing that somebody saw. `by`: who saw what. `values`: (d,), up to a factor. `hidden`: "yes" where the
    protection claims that it tells nothing of one client, "sum" where it claims to hide single updates only, "no".
    """

    by: str
    values: Tensor = field(repr=False)
    hidden: str


def views_of(
    strategy: Strategy, spec: ModelSpec, parameters: Tensor, victim: Update, others: Sequence[Update], seed: int
) -> list[View]:
    """Return everything that is seen of `victim`, an update as training made it, when `others` take part as well."""
    state = strategy.init(spec)
    half, told = strategy.client_half(), strategy.told(state)

    def encoded(update: Update, place: int) -> Update:
        draws = Draws.of(seed, "view", place)
        return half.encode(update, told, half.memory(spec), draws)[0].outgoing()

    rows = [encoded(update, place) for place, update in enumerate([victim, *others])]
    if strategy.takes_secure_sums:
        return _secure(strategy, spec, rows, seed)
    seen = _view("the server: one client's update", rows[0].values, spec, "no")
    terms = strategy.privacy()
    if terms is None:
        return seen
    if not terms.server_noise:
        return _view("the server: one client's noised update", rows[0].values, spec, "yes")
    accumulator = strategy.accumulator(spec)
    accumulator.add(rows[0])
    stepped, _ = strategy.step(parameters, accumulator.total(), state, Draws.of(seed, "view"))
    return [*seen, *_view("the world: the released step, all others known", stepped - parameters, spec, "yes")]


def _view(by: str, values: Tensor, spec: ModelSpec, hidden: str) -> list[View]:
    return [View(by, values[: spec.size].float(), hidden)] if len(values) >= spec.size else []


def _secure(strategy: Strategy, spec: ModelSpec, rows: Sequence[Update], seed: int) -> list[View]:
    from fedml_core.ring import RingSum  # loads cryptography
    from fedml_core.secagg.keystream import Keystream
    from fedml_core.secagg.secrets import Secret
    from strategies.secure import SecureAggregation

    assert isinstance(strategy, SecureAggregation)
    minimum = strategy.protocol.minimum
    encoding = strategy.encoding(max(len(rows), minimum), strategy.clip, tuple(rows[0].sums))
    total = RingSum(encoding, strategy.pipeline().encoded_size(spec.size), (seed, "view"))
    total.add(rows[0], [0])
    masked = np.array(total.ring)
    if strategy.draw_masks:
        # A mask is such a keystream; the server knows no key of an honest client's.
        words = np.empty_like(masked)
        with Secret.fresh() as key:
            stream, at = Keystream(key), 4096
            for start in range(0, len(words), at):
                stream.into(words[start : start + at])
        masked += words
    centred = masked.view(masked.dtype.str.replace("u", "i")).astype(np.float64)
    for place, row in enumerate(rows[1:], start=1):
        total.add(row, [place])
    seen = _view("the server: one client's masked vector", torch.from_numpy(centred), spec, "yes")
    noised = strategy.privacy() is not None
    said = f"the server: the {'noised ' if noised else ''}sum of {len(rows)} updates"
    return [*seen, *_view(said, total.total().values, spec, "yes" if noised else "sum")]
