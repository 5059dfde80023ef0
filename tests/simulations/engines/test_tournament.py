"""The rules by which engines are measured and one is chosen, with made-up timings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from simulations import Engine, Fused, Processes, Sequential, Tuned, Vectorised
from simulations.engines.batched import Batched
from simulations.engines.tournament import Match, Timing, Trial, described, tournament

CONTIGUOUS = Sequential(memory_layout="contiguous")


def fused(size: int) -> Fused:
    return Fused(clients_at_once=size)


def vectorised(size: int) -> Vectorised:
    return Vectorised(clients_at_once=size)


LADDERS: list[list[Batched]] = [[fused(4), fused(16), fused(64)], [vectorised(4), vectorised(16)]]


def winner(
    rates: Callable[[Engine], float],
    *,
    unable: tuple[str, ...] = (),
    fits: int = 1_000,
    seconds: float = 1.0,
    **match: Any,
) -> tuple[Engine, list[Trial]]:
    """Return who wins where engines are as fast as `rates` says and `fits` clients fit the memory, and all trials."""
    trials = tournament(Match(**{"ladders": LADDERS, "plain": Sequential(), "cohort": 100, **match}))
    tried: list[Trial] = []
    timing: Timing | None = None
    while True:
        try:
            tried.append(next(trials) if timing is None else trials.send(timing))
        except StopIteration as end:
            return end.value, tried
        engine = tried[-1].engine
        crowded = isinstance(engine, Batched) and (engine.clients_at_once or 0) > fits
        able = engine.name not in unable and not crowded
        timing = Timing(engine, rates(engine), seconds, able=able, crowded=crowded)


def by_name(**rates: float) -> Callable[[Engine], float]:
    return lambda engine: rates.get(engine.name, 0.0)


def test_the_fastest_engine_wins() -> None:
    assert winner(by_name(fused=5, sequential=7))[0] == Sequential()
    assert winner(by_name(fused=8, sequential=7))[0] == fused(4)


def test_more_clients_at_once_are_tried_as_long_as_they_are_faster() -> None:
    def rate(engine: Any) -> float:
        return {fused(4): 10.0, fused(16): 12.0, fused(64): 11.0}.get(engine, 1.0)

    best, tried = winner(rate)
    assert best == fused(16)
    turns = [4, 4, 16, 16, 4, 16, 64, 64, 16, 64]
    assert [trial.size for trial in tried if trial.engine.name == "fused"] == turns
    best, tried = winner(by_name(fused=9))
    assert best == fused(4) and fused(64) not in [trial.engine for trial in tried]


def test_what_is_written_by_hand_beats_what_is_not() -> None:
    _, tried = winner(by_name(fused=5, vectorised=50))
    assert "vectorised" not in [trial.engine.name for trial in tried]


def test_an_engine_that_gives_up_cannot_win() -> None:
    rates = by_name(fused=50, vectorised=9, sequential=7, processes=20)
    assert winner(rates, unable=("fused",))[0] == vectorised(4)
    assert winner(rates, unable=("fused", "vectorised"))[0] == Sequential()
    assert winner(rates, unable=("fused", "processes"), workers=2)[0] == vectorised(4)
    assert winner(by_name(), unable=("fused", "vectorised"), workers=2, threads=2)[0] == Sequential()


@pytest.mark.parametrize(("fits", "chosen"), [(1_000, 64), (63, 16), (15, 4), (3, 2), (1, 1)])
def test_as_many_clients_at_once_as_fit_the_memory(fits: int, chosen: int) -> None:
    rates: Callable[[Engine], float] = lambda engine: getattr(engine, "clients_at_once", 0.5)  # noqa: E731
    assert winner(rates, fits=fits, ladders=LADDERS[:1])[0] == fused(chosen)


def test_where_not_even_one_client_fits_at_once_they_train_one_by_one() -> None:
    assert winner(by_name(fused=9, vectorised=9, sequential=1), fits=0)[0] == Sequential()


def test_workers_must_be_clearly_faster() -> None:
    assert winner(by_name(fused=10, processes=10.5), workers=2)[0] == fused(4)
    assert winner(by_name(fused=10, processes=15), workers=2)[0] == Processes(workers=2, inner=fused(4))


def test_one_thread_is_chosen_unless_all_are_faster() -> None:
    assert winner(by_name(fused=10, tuned=9.9), threads=2)[0] == Tuned(threads=1, inner=fused(4))
    assert winner(by_name(fused=10, tuned=9), threads=2)[0] == fused(4)
    assert winner(by_name(sequential=10, tuned=5), threads=2, ladders=[])[0] == Sequential()
    several = winner(by_name(fused=10, tuned=12, processes=20), threads=2, workers=2)[0]
    assert several == Processes(workers=2, inner=fused(4))


def test_what_is_over_at_once_is_measured_again() -> None:
    assert len(winner(by_name(sequential=1), ladders=[], threads=2, seconds=1.0)[1]) == 6
    assert len(winner(by_name(sequential=1), ladders=[], threads=2, seconds=0.01)[1]) == 14


def test_an_engine_that_is_fast_now_and_then_does_not_win() -> None:
    shared = Processes(workers=2)
    times = itertools.count()

    def rate(engine: Engine) -> float:
        if engine != shared:
            return 10.0
        return 14.0 if next(times) % 3 == 1 else 8.0

    assert winner(rate, ladders=[], workers=2, seconds=0.01)[0] == Sequential()
    assert winner(lambda engine: 12.0 if engine == shared else 10.0, ladders=[], workers=2, seconds=0.01)[0] == shared


def test_where_there_is_no_choice_nothing_is_measured() -> None:
    assert winner(by_name(), ladders=[]) == (Sequential(), [])


def rates_of(rates: dict[Engine, float]) -> Callable[[Engine], float]:
    return lambda engine: rates.get(engine, 0.0)


def test_the_faster_memory_layout_is_chosen() -> None:
    for rate, chosen in ((11.0, CONTIGUOUS), (9.0, Sequential())):
        rates = rates_of({Sequential(): 10.0, CONTIGUOUS: rate})
        best, tried = winner(rates, ladders=[], layouts=["contiguous"])
        assert best == chosen
        turns = [CONTIGUOUS, CONTIGUOUS, Sequential(), CONTIGUOUS]
        assert [trial.engine for trial in tried] == [Sequential(), Sequential(), *turns]


def test_the_layout_that_won_is_what_everything_else_is_tried_with() -> None:
    shared, narrow = Processes(workers=2, inner=CONTIGUOUS), Tuned(threads=1, inner=CONTIGUOUS)
    rates = {Sequential(): 10.0, CONTIGUOUS: 11.0, narrow: 12.0}
    asked: dict[str, Any] = {"ladders": [], "layouts": ["contiguous"], "threads": 2, "workers": 2}
    assert winner(rates_of({**rates, shared: 20.0}), **asked)[0] == shared
    assert winner(rates_of(rates), **asked)[0] == narrow
    plain, other = (dataclasses.replace(one, skip_failures=True) for one in (Sequential(), CONTIGUOUS))
    skipping = dataclasses.replace(narrow, skip_failures=True)
    assert winner(rates_of({plain: 1.0, other: 2.0, skipping: 3.0}), **asked, plain=plain)[0] == skipping


def test_freed_memory_is_kept_where_that_is_clearly_faster() -> None:
    kept = Tuned(keep_freed_memory=True, inner=fused(4))
    for rate, chosen in ((10.5, kept), (10.2, fused(4)), (5.0, fused(4))):
        assert winner(rates_of({fused(4): 10.0, kept: rate}), keeps=True)[0] == chosen
        tried = winner(rates_of({fused(4): 10.0, kept: rate}))[1]
        assert kept not in [trial.engine for trial in tried]


@pytest.mark.parametrize("busy", [range(2), range(2, 4), range(4, 5)], ids=["first", "then", "later"])
@pytest.mark.parametrize(("kept_rate", "wins"), [(12.0, True), (10.0, False)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_machine_that_is_busy_for_a_while_does_not_change_who_wins(
    busy: range, kept_rate: float, wins: bool, workers: int
) -> None:
    challenger: Engine = Tuned(keep_freed_memory=True) if workers == 1 else Processes(workers=2)
    trials = itertools.count()

    def rate(engine: Engine) -> float:
        calm = kept_rate if engine == challenger else 10.0
        return calm / 5 if next(trials) - 2 * (workers - 1) in busy else calm

    best, _ = winner(rate, ladders=[], keeps=workers == 1, workers=workers)
    assert best == (challenger if wins else Sequential())


def test_freed_memory_is_kept_in_the_threads_that_won() -> None:
    narrow = Tuned(threads=1, inner=fused(4))
    both = Tuned(threads=1, keep_freed_memory=True, inner=fused(4))
    assert winner(rates_of({fused(4): 8.0, narrow: 10.0, both: 11.0}), threads=2, keeps=True)[0] == both


def test_workers_are_compared_with_kept_memory_and_have_their_own() -> None:
    kept, shared = Tuned(keep_freed_memory=True, inner=fused(4)), Processes(workers=2, inner=fused(4))
    rates = {fused(4): 8.0, kept: 10.0}
    assert winner(rates_of({**rates, shared: 10.5}), keeps=True, workers=2)[0] == kept
    assert winner(rates_of({**rates, shared: 15.0}), keeps=True, workers=2)[0] == shared


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Sequential(), "sequential"),
        (Sequential(memory_layout="channels_last"), "sequential in channels-last layout"),
        (Tuned(threads=2, inner=fused(3)), "fused with 3 clients at once in 2 threads"),
        (Tuned(keep_freed_memory=True), "sequential with freed memory kept"),
        (
            Tuned(threads=1, keep_freed_memory=True, inner=CONTIGUOUS),
            "sequential in contiguous layout in 1 thread with freed memory kept",
        ),
        (Processes(workers=2, inner=CONTIGUOUS), "2 processes of sequential in contiguous layout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_people_are_told_everything_that_was_chosen(engine: Engine, said: str) -> None:
    assert described(engine) == said
