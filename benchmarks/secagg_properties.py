"""Runs the properties A1, A2 and A7 of secure aggregation at full size; prints one JSON line, or fails.

    python -m benchmarks.secagg_properties [--members 100] [--parameters 100000] [--subsets 1000] [--schedules 1000]

A1: the sum is exact for random dropouts at every exchange. A2: no random malicious schedule gets both kinds of share.
A7: the largest legal inputs decode exactly, and the mean error stays within its bound over 1,000 seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np

from fedml_core.secagg.encoding import RingEncoding
from tests.adversary.players import World
from tests.adversary.test_lists import Schedule


def exactness(members: int, parameters: int, subsets: int) -> int:
    """Return how many members were lost in all; every sum is compared bit for bit.

    Vectors of the full length for one subset in a hundred: the masks of a sum of `parameters` elements take seconds.
    """
    lost_in_all = 0
    for seed in range(subsets):
        chooser, left, lost = random.Random(seed), set(range(members)), []
        room = members - (members + members // 20) // 2 - 1
        for _ in range(5):
            gone = frozenset(chooser.sample(sorted(left), chooser.randint(0, room // 2)))
            room -= len(gone)
            left -= gone
            lost.append(gone)
        world = World(members, corrupt_share=0.05, length=parameters if seed % 100 == 0 else 64, seed=seed)
        total = world.run(lost)
        summed = set(range(members)) - lost[0] - lost[1] - lost[2]
        if not np.array_equal(total, world.sum_of(summed)):
            raise SystemExit(f"A1 fails: subset {seed} gives another sum")
        lost_in_all += members - len(left)
    return lost_in_all


def schedules(count: int) -> int:
    """Return how many random malicious schedules were answered by anybody."""
    answered = 0
    for seed in range(count):
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
    """Run all three and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--subsets", type=int, default=1000)
    parser.add_argument("--schedules", type=int, default=1000)
    asked = parser.parse_args()
    line: dict[str, object] = vars(asked).copy()
    for name, run in (
        ("a1_lost", lambda: exactness(asked.members, asked.parameters, asked.subsets)),
        ("a2_answered", lambda: schedules(asked.schedules)),
        ("a7_error_over_bound", lambda: round(overflow(asked.members, asked.parameters), 4)),
    ):
        started = time.process_time()
        line[name] = run()
        line[f"{name.split('_')[0]}_cpu_s"] = round(time.process_time() - started, 1)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
