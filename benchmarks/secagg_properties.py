"""Runs the properties A1, A2, A6 and A7 of secure aggregation at full size; prints one JSON line, or fails.

    python -m benchmarks.secagg_properties [--members 100] [--parameters 100000] [--subsets 1000] [--schedules 1000]
        [--keys 100000]

A1: the sum is exact for every dropout of 3 and of 10 members, and for random ones of `members`, at every exchange; what
a member sends is uniform and tells nothing of its vector. A2: no random malicious schedule gets both kinds of share.
A6: every bit of the masks' keys is as often one as zero. A7: the largest legal inputs decode exactly, and the mean
error stays within its bound over 1,000 seeds. Progress goes to the standard error.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from benchmarks.measuring import print_properties
from fedml_core.secagg.encoding import RingEncoding
from fedml_core.secagg.masks import add_masks
from tests.adversary.players import World
from tests.adversary.test_lists import Schedule

_FULL_LENGTH = 100
"""One in so many random subsets has vectors of the full length, whose masks take seconds."""
_FALSE_ALARM = 1e-4
_MOST_SIGMAS = 6


def every_dropout(members: int) -> Iterator[Sequence[Collection[int]]]:
    """Return whoever may be lost at each one exchange, as far as more than half of the members are left."""
    most = members - members // 2 - 1
    for exchange, size in itertools.product(range(5), range(most + 1)):
        for gone in itertools.combinations(range(members), size):
            yield [gone if place == exchange else () for place in range(5)]


def random_dropout(members: int, seed: int) -> Sequence[Collection[int]]:
    """Return who is lost at each exchange, as many in all as a twentieth of corrupt members allows at most."""
    chooser, left, lost = random.Random(seed), set(range(members)), []
    room = members - (members + members // 20) // 2 - 1
    for _ in range(5):
        gone = frozenset(chooser.sample(sorted(left), chooser.randint(0, room // 2)))
        room -= len(gone)
        left -= gone
        lost.append(gone)
    return lost


def require_exact(world: World, lost: Sequence[Collection[int]]) -> int:
    """Return how many members were lost; the sum is compared bit for bit with that of the survivors' vectors."""
    total = world.run(lost)
    if not np.array_equal(total, world.sum_of(set(world.members).difference(*lost[:3]))):
        raise SystemExit(f"A1 fails: {len(world.members)} members of whom {lost} are lost give another sum")
    return len(set().union(*lost))


def exactness(members: int, parameters: int, subsets: int) -> int:
    """Return how many members were lost in all."""
    lost_in_all = 0
    for few in (3, 10):
        for lost in progress(f"A1, {few} members", list(every_dropout(few))):
            lost_in_all += require_exact(World(few, length=parameters), lost)
    for seed in progress(f"A1, {members} members", range(subsets)):
        length = parameters if seed % _FULL_LENGTH == 0 else 64
        world = World(members, corrupt_share=0.05, length=length, seed=seed)
        lost_in_all += require_exact(world, random_dropout(members, seed))
    return lost_in_all


def hiding(members: int, parameters: int) -> float:
    """Return the smallest p-value of any byte of any masked vector, times their number; vectors are all but uniform.

    By chance alone this fails once in 10,000 times for its bytes, and less often for its correlations.
    """
    ramp = np.arange(parameters, dtype="<u4")
    world = World(members, length=parameters, corrupt_share=0.05, vectors=dict.fromkeys(range(members), ramp))
    world.advertise()
    world.share()
    smallest = 1.0
    for member in progress("A1, what is sent", world.members):
        _, masked = world.masked(member)
        smallest = min(smallest, *(float(chi2.sf(one, 255)) for one in chi_squares(masked)))
        if abs(np.corrcoef(masked.astype(float), ramp)[0, 1]) > _MOST_SIGMAS / parameters**0.5:
            raise SystemExit(f"A1 fails: what member {member} sends goes along with its vector")
    family = smallest * members * 4
    if family < _FALSE_ALARM:
        raise SystemExit(f"A1 fails: a byte of what is sent is not uniform, p = {smallest}")
    return family


def chi_squares(masked: NDArray[Any]) -> list[float]:
    """Return, for each byte of an element, the statistic of its 256 values; of 255 degrees of freedom if uniform."""
    expected = masked.size / 256
    places = masked.view(np.uint8).reshape(masked.size, -1).T
    return [float(((np.bincount(place, minlength=256) - expected) ** 2).sum() / expected) for place in places]


def key_bits(members: int, keys: int) -> float:
    """Return how far from a half the mean of any bit of the masks' keys is, over so many that members really used."""
    seen: dict[bytes, None] = {}

    def noting(total: NDArray[Any], masks: Any, **settings: Any) -> None:
        seen.update((key.bytes(), None) for key, _ in masks)
        add_masks(total, masks, **settings)

    rounds = -(-keys // (members * (members + 1) // 2))
    with patch("fedml_core.secagg.client.add_masks", noting):
        for _ in progress("A6", range(rounds)):
            World(members, corrupt_share=0.05).until_masked()
    drawn = np.frombuffer(b"".join(itertools.islice(seen, keys)), np.uint8).reshape(-1, 32)
    if len(drawn) < keys:
        raise SystemExit(f"A6 fails: {rounds} sums of {members} members used {len(drawn)} different keys")
    worst = float(np.abs(np.unpackbits(drawn, axis=1).mean(axis=0) - 0.5).max())
    if worst > _MOST_SIGMAS * 0.5 / keys**0.5:
        raise SystemExit(f"A6 fails: a bit of the keys is one in {0.5 + worst:.4f} of {keys} cases, or zero")
    return worst


def progress(what: str, work: Sequence[Any]) -> Iterator[Any]:
    """Return the work, piece by piece, and say from time to time how much of it is done."""
    for number, piece in enumerate(work):
        if number % (1 + len(work) // 10) == 0:
            print(f"{what}: {number} of {len(work)}", file=sys.stderr, flush=True)
        yield piece


def schedules(count: int) -> int:
    """Return how many random malicious schedules were answered by anybody."""
    answered = 0
    for seed in progress("A2", range(count)):
        schedule = Schedule(seed, 4 + seed % 6)
        schedule.play()
        if schedule.both_kinds_from_one() or schedule.both_secrets():
            raise SystemExit(f"A2 fails: schedule {seed} gets both kinds of share")
        answered += bool(schedule.server.loot.seeds.keys() - {0})
    return answered


def overflow(members: int, parameters: int, seeds: int = 1000) -> float:
    """Return the largest mean error over its bound; full-range inputs must decode to themselves."""
    encoding = RingEncoding(1.0, members)
    for value in (1.0, -1.0, 7.0, 0.0):
        row = encoding.encode(np.full(parameters, value, np.float32), bytes(32))
        total = np.zeros_like(row)
        for _ in range(members):
            total += row
        expected = members * min(max(value, -1.0), 1.0)
        if not np.allclose(encoding.decode(total, members).values, expected, rtol=0, atol=1e-9):
            raise SystemExit(f"A7 fails: {members} times {value} does not decode to {expected}")
    errors = []
    truth = np.linspace(-0.9, 0.9, 1001)
    for seed in range(seeds):
        row = encoding.encode(truth, seed.to_bytes(32, "big"))
        errors.append(encoding.decode(row, 1).values - truth)
    deviation = float(np.sqrt(np.mean(np.square(errors), axis=0)).max())
    bias = float(np.abs(np.mean(errors)) / (np.std(errors) / np.sqrt(np.size(errors))))
    if deviation > encoding.mean_error(1) * 1.1 or bias > 3:
        raise SystemExit(f"A7 fails: deviation {deviation}, bias of {bias} standard errors")
    return deviation / encoding.mean_error(1)


def main() -> None:
    """Run them all and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--subsets", type=int, default=1000)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=100_000)
    asked = parser.parse_args()
    line: dict[str, object] = {"bench": "properties", **vars(asked)}
    runs: dict[str, Callable[[], float]] = {
        "a1_lost": lambda: exactness(asked.members, asked.parameters, asked.subsets),
        "a1_hiding_p": lambda: round(hiding(asked.members, asked.parameters), 4),
        "a2_answered": lambda: schedules(asked.schedules),
        "a6_worst_bit": lambda: round(key_bits(asked.members, asked.keys), 5),
        "a7_error_over_bound": lambda: round(overflow(asked.members, asked.parameters), 4),
    }
    print_properties(line, runs)


if __name__ == "__main__":
    main()
