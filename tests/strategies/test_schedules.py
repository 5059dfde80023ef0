from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from fedml_core.errors import ConfigError, StrategyError
from strategies import Constant, CosineDecay, ExponentialDecay, Schedule, StepDecay, Warmup
from strategies.schedules import rate_at, require_rate

SCHEDULES = [
    Constant(0.1),
    StepDecay(0.1, every=3),
    ExponentialDecay(0.1, factor=0.5),
    CosineDecay(0.1, rounds=5, final=0.01),
    Warmup(rounds=2, then=0.1),
    Warmup(rounds=2, then=CosineDecay(0.1, rounds=5)),
]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.3), [0.3, 0.3, 0.3, 0.3]),
        (StepDecay(1.0, every=2, factor=0.1), [1.0, 1.0, 0.1, 0.1]),
        (ExponentialDecay(2.0, factor=0.5), [2.0, 1.0, 0.5, 0.25]),
        (CosineDecay(1.0, rounds=3, final=0.5), [1.0, 0.75, 0.5, 0.5]),
        (Warmup(rounds=3, then=0.9), [0.3, 0.6, 0.9, 0.9]),
        (Warmup(rounds=1, then=ExponentialDecay(1.0, factor=0.5)), [1.0, 0.5, 0.25, 0.125]),
        (Warmup(rounds=2, then=ExponentialDecay(1.0, factor=0.5)), [0.5, 1.0, 0.5, 0.25]),
    ],
    ids=repr,
)
def test_the_rates_of_the_first_rounds(schedule: Schedule, expected: list[float]) -> None:
    assert [rate_at(schedule, number) for number in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-12)


def test_a_number_is_a_constant_schedule() -> None:
    assert [rate_at(0.2, number) for number in (1, 100)] == [0.2, 0.2]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_travels_by_name(schedule: Schedule) -> None:
    assert Schedule.from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_rate_of_a_thousand_rounds_is_a_finite_number_from_zero(schedule: Schedule) -> None:
    rates = [schedule.at(number) for number in range(1, 1001)]
    assert all(0 <= rate <= 0.1 * (1 + 1e-12) and math.isfinite(rate) for rate in rates)


def test_every_schedule_has_a_row_here() -> None:
    ours = {name for name, kind in Schedule.members.items() if kind.__module__ == "strategies.schedules"}
    assert {type(schedule).__name__ for schedule in SCHEDULES} == ours


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0.0), "rate must be > 0, got 0.0"),
        (lambda: StepDecay(-1.0, every=1), "initial must be > 0, got -1.0"),
        (lambda: StepDecay(1.0, every=0), "every must be >= 1, got 0"),
        (lambda: StepDecay(1.0, every=1, factor=1.5), "factor must be > 0 and <= 1, got 1.5"),
        (lambda: ExponentialDecay(1.0, factor=0.0), "factor must be > 0 and <= 1, got 0.0"),
        (lambda: CosineDecay(1.0, rounds=1), "rounds must be >= 2, got 1"),
        (lambda: CosineDecay(1.0, rounds=5, final=2.0), "final must be >= 0 and <= 1, got 2.0"),
        (lambda: Warmup(rounds=0, then=1.0), "rounds must be >= 1, got 0"),
        (lambda: Warmup(rounds=2.5, then=1.0), "rounds must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: Warmup(rounds=2, then=None), "then must be a number or a schedule, got None"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_is_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make()


def test_require_rate_takes_schedules_and_positive_numbers() -> None:
    require_rate("rate", Constant(0.1))
    require_rate("rate", 2)
    with pytest.raises(ConfigError, match="rate must be > 0, got -2"):
        require_rate("rate", -2)


def test_a_schedule_without_a_rate_says_what_to_define() -> None:
    @dataclass(frozen=True)
    class _Empty(Schedule):
        pass

    with pytest.raises(StrategyError, match=r"_Empty must define at\(round_number\)"):
        _Empty().at(1)
