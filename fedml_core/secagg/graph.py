"""Who masks with whom, and how many holders open a secret: degree and threshold, computed; the graph, drawn from a key.

Up to 100 clients, everybody is everybody's neighbour, and a client holds a share of its own secrets, too. Above, each
has k neighbours: on a ring of all clients in a random order, the k / 2 before it and the k / 2 behind it (a Harary
graph). Bell et al. (2020), doi:10.1145/3372297.3417885; the degree is the smallest even one for which the exact tails
of the hypergeometric distribution and a union bound over the two gaps that split a ring leave as little as was asked.

The graph is no secret: its key must be fixed only after every client has committed to its part in it.

Guarantees: logarithms of probabilities are rounded against us, by more than all their rounding errors.
Guarantees: 2 threshold > holders + corrupt holders if the server may be active, so no secret can be opened by telling
    two halves different stories; in a graph that is not complete, but for a probability of 2^-security_bits.
Guarantees: enough holders are left if no more clients than the dropout share are lost; in a graph that is not
    complete, but for a probability of 2^-correctness_bits.
Trust: these numbers hold against at most the stated share of corrupt clients, together with the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedml_core.checks import require_number, require_whole
from fedml_core.errors import ConfigError, SecureAggregationError

__all__ = [
    "ALWAYS_COMPLETE",
    "EVER_COMPLETE",
    "KEY_BYTES",
    "Neighbourhood",
    "at_most",
    "complete",
    "connected",
    "neighbourhood",
    "neighbours",
    "regular",
]

ALWAYS_COMPLETE = 100
"""Up to so many clients the graph is complete: fewer neighbours would save next to nothing."""
EVER_COMPLETE = 1000
"""Up to so many clients the graph is complete where no sparser one will do."""
KEY_BYTES = 32
"""The size of the key that a graph is drawn from."""

_MOST_CLIENTS = 10**6
_ROUNDING = 1e-6  # of a logarithm; at 10^6 clients, the largest error seen against exact integers is 1e-8
_WORD = np.uint64(2**32)


class Neighbourhood(NamedTuple):
    """How many neighbours a client has, and how many holders of its shares open its secrets."""

    degree: int
    threshold: int


def neighbourhood(
    clients: int,
    corrupt_share: float,
    dropout_share: float,
    *,
    active: bool = True,
    security_bits: int = 60,
    correctness_bits: int = 20,
) -> Neighbourhood:
    """Return degree and threshold for so many clients, of which so large shares may be corrupt, and may drop out.

    Args: active: whether the server may deviate from the protocol; otherwise it is honest but curious. security_bits,
        correctness_bits: see the module; they matter only above `ALWAYS_COMPLETE` clients.
    Raises: ConfigError: if an argument is out of range, or no threshold is both safe and reachable.
    """
    require_whole("clients", clients, at_least=2, at_most=_MOST_CLIENTS)
    require_number("corrupt_share", corrupt_share, at_least=0, below=1)
    require_number("dropout_share", dropout_share, at_least=0, below=1)
    require_whole("security_bits", security_bits, at_least=20, at_most=128)
    require_whole("correctness_bits", correctness_bits, at_least=1, at_most=128)
    found = None
    if clients > ALWAYS_COMPLETE:
        bits = (security_bits, correctness_bits)
        found = regular(clients, corrupt_share, dropout_share, active=active, bits=bits)
    if found is None and clients <= EVER_COMPLETE:
        found = complete(clients, corrupt_share, dropout_share, active=active)
    if found is None:
        corrupt, lost = at_most(corrupt_share, clients), at_most(dropout_share, clients)
        raise ConfigError(
            f"{clients} clients of which {corrupt} may be corrupt and {lost} may drop out have no threshold that "
            f"{'an active' if active else 'a curious'} server cannot abuse and that the rest can reach; lower "
            f"corrupt_share ({corrupt_share:g}) or dropout_share ({dropout_share:g})"
        )
    return found


def at_most(share: float, clients: int) -> int:
    """Return the largest whole number of clients within a share, for the decimal number that was written.

    Example:
        >>> at_most(0.29, 100), math.floor(0.29 * 100)
        (29, 28)
    """
    return math.floor(Fraction(repr(float(share))) * clients)


def complete(clients: int, corrupt_share: float, dropout_share: float, *, active: bool) -> Neighbourhood | None:
    """Return the threshold of a complete graph, in which all clients hold shares; None if too few could be left."""
    corrupt, lost = at_most(corrupt_share, clients), at_most(dropout_share, clients)
    threshold = _safe_threshold(clients, corrupt, active)
    return Neighbourhood(clients - 1, threshold) if threshold <= clients - lost else None


def regular(
    clients: int, corrupt_share: float, dropout_share: float, *, active: bool, bits: tuple[int, int]
) -> Neighbourhood | None:
    """Return the smallest even degree below clients - 1 with a threshold that is safe and reachable; None if none is.

    Args: bits: of security and of correctness: each fails with a probability of at most 2^-bits for all clients.
    """
    corrupt, lost = at_most(corrupt_share, clients), at_most(dropout_share, clients)
    if (corrupt + (2 if active else 1) * lost) * 10 > 9 * clients:
        return None  # so near the limit that the degree would be next to complete, and long to search for
    secure = -(bits[0] + 1) * math.log(2)  # halved: the graph may fall apart, or a client's neighbours be corrupt
    correct = -bits[1] * math.log(2)
    most_corrupt = most_lost = 0
    for degree in range(2, clients - 1, 2):
        most_corrupt = _quantile(clients, corrupt, degree, secure - math.log(clients), most_corrupt)
        most_lost = _quantile(clients, lost, degree, correct - math.log(clients), most_lost)
        threshold = _safe_threshold(degree, most_corrupt, active)
        if threshold <= degree - most_lost and _log_of_a_split(clients, corrupt + lost, degree) < secure:
            return Neighbourhood(degree, threshold)
    return None


def neighbours(clients: int, degree: int, key: bytes) -> NDArray[np.int64]:
    """Return every client's neighbours, ascending, by place: (clients, degree).

    Guarantees: who is my neighbour has me as its neighbour; nobody is its own neighbour, or another's twice.
    Guarantees: the order on the ring is uniform over all orders for a random key, and is the same for all who compute
        it.
    Args: degree: even, or clients - 1. key: 32 bytes that nothing else is drawn from.
    Raises: SecureAggregationError: if there is no such graph, or the key has another size.
    """
    everybody = np.arange(clients, dtype=np.int64)
    if degree == clients - 1 >= 1:
        others = np.broadcast_to(everybody[:-1], (clients, degree))
        return others + (others >= everybody[:, None])
    if not 2 <= degree < clients or degree % 2:
        raise SecureAggregationError(
            f"a graph of {clients} clients needs an even degree from 2 up to {clients - 2}, or {clients - 1}, "
            f"got {degree}"
        )
    ring = np.array(_shuffled(clients, key), np.int64)
    steps = np.concatenate([np.arange(-degree // 2, 0), np.arange(1, degree // 2 + 1)])
    table = np.empty((clients, degree), np.int64)
    table[ring] = np.sort(ring[(everybody[:, None] + steps) % clients], axis=1)
    return table


def connected(table: NDArray[np.int64], survivors: Sequence[int]) -> bool:
    """Return whether the survivors, by place, hang together by edges between survivors; nobody does not.

    Guarantees: true only if every survivor can be reached from every other without passing one who is lost.
    Raises: SecureAggregationError: if a survivor is not in the table, or is named twice.
    """
    chosen = np.asarray(survivors, np.int64)
    if len(chosen) == 0:
        return False
    if chosen.min() < 0 or chosen.max() >= len(table) or len(np.unique(chosen)) != len(chosen):
        raise SecureAggregationError(f"survivors must be different places from 0 to {len(table) - 1}")
    waiting = np.zeros(len(table), np.bool_)
    waiting[chosen] = True
    frontier = chosen[:1]
    waiting[frontier] = False
    while len(frontier):  # each client is in one frontier at most, so all edges are followed once
        beside = np.unique(table[frontier])
        frontier = beside[waiting[beside]]
        waiting[frontier] = False
    return not np.any(waiting)


def _safe_threshold(holders: int, corrupt: int, active: bool) -> int:
    """Return the smallest safe threshold; never 1, which would hand every holder the secret itself."""
    return max(2, (holders + corrupt) // 2 + 1 if active else corrupt + 1)


def _quantile(clients: int, marked: int, drawn: int, log_bound: float, start: int) -> int:
    """Return the smallest t >= start with P[more than t of `drawn` clients are marked] <= e^log_bound."""
    while _log_tail(clients, marked, drawn, start) > log_bound - _ROUNDING:
        start += 1
    return start


def _log_tail(clients: int, marked: int, drawn: int, limit: int) -> float:
    """Return ln P[X > limit] for X, the number of marked ones among `drawn` of the clients, without replacement."""
    value, highest = max(limit + 1, drawn + marked - clients), min(marked, drawn)
    if value > highest:
        return -math.inf
    first = _log_choose(marked, value) + _log_choose(clients - marked, drawn - value) - _log_choose(clients, drawn)
    total = term = 1.0
    while value < highest and term > 1e-12 * total:  # terms fall ever faster, once they fall
        above = (value + 1) * (clients - marked - drawn + value + 1)
        term *= (marked - value) * (drawn - value) / above
        value, total = value + 1, total + term
    return first + math.log(total)


def _log_of_a_split(clients: int, bad: int, degree: int) -> float:
    """Return a bound on ln P[the graph without its bad clients falls apart].

    That takes degree / 2 bad clients in a row at two places of the ring: so many pairs of places, each so likely.
    """
    if degree > bad:
        return -math.inf
    pairs = math.log(clients) + math.log(clients - degree - 1) - math.log(2)
    return pairs + _log_choose(bad, degree) - _log_choose(clients, degree) + _ROUNDING


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _shuffled(count: int, key: bytes) -> list[int]:
    """Return 0 to count - 1 in an order drawn from `key`: Fisher and Yates's shuffle over an AES-256-CTR key stream."""
    if len(key) != KEY_BYTES:
        raise SecureAggregationError(f"a graph's key must have {KEY_BYTES} bytes, got {len(key)}")
    # The counter starts at zero: each key draws one graph and nothing else.
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(size: int) -> NDArray[np.uint64]:
        return np.frombuffer(stream.update(bytes(4 * size)), "<u4").astype(np.uint64)

    drawn = _below(np.arange(count, 1, -1, dtype=np.uint64), words)
    order = list(range(count))
    for last, chosen in zip(range(count - 1, 0, -1), drawn.tolist(), strict=True):
        order[last], order[chosen] = order[chosen], order[last]
    return order


def _below(bounds: NDArray[np.uint64], words: Callable[[int], NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return a uniform number below each bound from uniform 32-bit words; those that would favour some are replaced."""
    drawn = words(len(bounds))
    while np.any(uneven := drawn >= _WORD - _WORD % bounds):
        drawn[uneven] = words(int(np.count_nonzero(uneven)))
    return drawn % bounds
