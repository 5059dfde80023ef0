"""Who is there when: daily patterns against a definition written out, and traces from files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from fedml_core.errors import ConfigError
from simulations import Always, Daily, Trace

HOUR = 3600.0


def test_always_is_everybody() -> None:
    assert Always().available(5, 123.0, 0) == range(5)
    assert Always().next_s(5, 123.0, 0) == 123.0


@pytest.mark.parametrize(
    "pattern", [Daily(), Daily(4 * HOUR, 10 * HOUR, 3 * HOUR), Daily(10.0, 10.0), Daily(3.0, 7.0, 0.0)]
)
@pytest.mark.parametrize("count", [1, 2, 10, 37])
def test_each_client_is_there_for_its_hours_of_every_period(pattern: Daily, count: int) -> None:
    spread = pattern.period_s if pattern.spread_s is None else pattern.spread_s
    # Off the edges, so that no rounding decides: starts are multiples of spread / count.
    for step in range(40):
        now = pattern.period_s * (1 + (step + 0.2371) / 17)
        there = pattern.available(count, now, seed=3)
        time = now % pattern.period_s
        expected = sum((time - spread * rank / count) % pattern.period_s < pattern.on_s for rank in range(count))
        assert len(there) == len(set(there)) == expected
        assert set(there) <= set(range(count))


def test_over_a_period_every_client_is_there_equally_long() -> None:
    pattern, seen = Daily(on_s=250.0, period_s=1000.0), dict.fromkeys(range(20), 0)
    for step in range(200):
        for client in pattern.available(20, 5 * step + 0.1, seed=1):
            seen[client] += 1
    assert set(seen.values()) == {50}


def test_the_seed_decides_who_comes_when() -> None:
    pattern = Daily(on_s=250.0, period_s=1000.0)
    assert list(pattern.available(1000, 10.0, 1)) == list(pattern.available(1000, 10.0, 1))
    assert set(pattern.available(1000, 10.0, 1)) != set(pattern.available(1000, 10.0, 2))


def test_neighbouring_clients_do_not_come_together() -> None:
    there = sorted(Daily(on_s=100.0, period_s=1000.0).available(1000, 500.0, 1))
    # 100 of 1000 clients in no block: the gaps are close to 10 everywhere.
    assert len(there) == 100
    assert max(later - earlier for earlier, later in itertools.pairwise(there)) < 30


def test_a_population_of_a_billion_is_not_looked_at() -> None:
    there = Daily().available(10**9, 12 * HOUR, 1)
    assert abs(len(there) - 10**9 / 3) <= 1
    some = there[:5]
    assert list(some) == [there[place] for place in range(5)] and there[-1] == there[len(there) - 1]
    assert all(0 <= client < 10**9 for client in some)
    with pytest.raises(IndexError, match="got place"):
        there[len(there)]


def test_where_nobody_is_there_the_next_start_is_known() -> None:
    together = Daily(on_s=100.0, period_s=1000.0, spread_s=0.0)
    assert len(together.available(10, 99.0, 0)) == 10 and len(together.available(10, 100.0, 0)) == 0
    assert together.next_s(10, 150.0, 0) == 1000.0 and together.next_s(10, 2150.0, 0) == 3000.0
    sparse = Daily(on_s=10.0, period_s=1000.0)
    assert len(sparse.available(4, 300.0, 0)) == 0
    assert sparse.next_s(4, 300.0, 0) == 500.0
    assert len(sparse.available(4, 500.0, 0)) == 1
    assert sparse.next_s(4, 800.0, 0) == 1000.0


def test_after_the_wait_somebody_is_there_whatever_the_rounding() -> None:
    for count in (3, 7, 11):
        pattern = Daily(on_s=0.1, period_s=0.7 * count)
        now = 0.0
        for _ in range(300):
            now += 0.1 + 1e-3
            if not len(pattern.available(count, now, 0)):
                later = pattern.next_s(count, now, 0)
                assert later is not None and later > now
                now = later
                assert len(pattern.available(count, now, 0)) == 1


CSV = "client,start_s,end_s\n0,0,100\n2,50,80\n2,80,90\n2,200,300\n9,0,1000\n"
JSON = '{"0": [[0, 100]], "2": [[200, 300], [50, 80], [80, 90]], "9": [[0, 1000]]}'


@pytest.mark.parametrize(("name", "text"), [("t.csv", CSV), ("t.json", JSON)])
def test_a_trace_says_who_is_there(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    trace = Trace(name).beside(tmp_path)
    assert trace.available(5, 0.0, 0) == [0]
    assert trace.available(5, 85.0, 0) == [0, 2]
    assert trace.available(5, 90.0, 0) == [0]
    assert trace.available(5, 150.0, 0) == []
    assert trace.next_s(5, 150.0, 0) == 200.0
    assert trace.next_s(5, 300.0, 0) is None
    assert trace.available(10, 150.0, 0) == [9]


def test_a_trace_repeats_with_its_period(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    trace = Trace(str(tmp_path / "t.csv"), period_s=1000.0)
    assert trace.available(5, 2085.0, 0) == [0, 2]
    assert trace.next_s(5, 2350.0, 0) == 3000.0


def test_a_trace_is_known_by_its_contents_not_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.json").write_text(JSON)
    (tmp_path / "c.csv").write_text(CSV + "3,1,2\n")
    one, same, other = (Trace(str(tmp_path / name)).identity() for name in ("a.csv", "b.json", "c.csv"))
    assert one == same != other


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "client,start,end\n", "the first line must be client,start_s,end_s, got 'client,start,end'"),
        ("t.csv", "", "the first line must be client,start_s,end_s, got ''"),
        ("t.csv", "client,start_s,end_s\n", "holds no interval, so nobody could ever be asked"),
        ("t.csv", "client,start_s,end_s\n1,2\n", "line 2 must have 3 columns, got 2"),
        ("t.csv", "client,start_s,end_s\n-1,2,3\n", "line 2: a client must be a whole number from 0, got '-1'"),
        ("t.csv", "client,start_s,end_s\n1,x,3\n", "line 2: a time must be a finite number of seconds, got 'x'"),
        ("t.csv", "client,start_s,end_s\n1,nan,3\n", "line 2: a time must be a finite number of seconds, got 'nan'"),
        ("t.csv", "client,start_s,end_s\n1,3,3\n", "line 2: an interval needs 0 <= start_s < end_s, got 3 to 3"),
        ("t.json", "[1]", 'must be an object such as {"0": [[0, 3600]]}, by client'),
        ("t.json", '{"0": 5}', "client '0' must have a list of [start_s, end_s], got 5"),
        ("t.json", '{"0": [[1, 2, 3]]}', "client '0' must have a list of [start_s, end_s], got [1, 2, 3]"),
        ("t.json", '{"0": [[1, true]]}', "client '0': a time must be a finite number of seconds, got True"),
        ("t.json", '{"x": [[1, 2]]}', "client 'x': a client must be a whole number from 0, got 'x'"),
        ("t.json", "{", "Expecting property name"),
        ("t.json", "[" * 100_000, "must be"),
    ],
)
def test_a_faulty_trace_is_refused_with_its_place(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        Trace(str(tmp_path / name)).available(5, 0.0, 0)
    assert said in str(caught.value) or (text.startswith("[[[") and "nested too deep" in str(caught.value))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_an_interval_beyond_the_period_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    with pytest.raises(ConfigError, match=r"0 <= start_s < end_s <= period_s = 200, got 200 to 300"):
        Trace(str(tmp_path / "t.csv"), period_s=200.0).available(5, 0.0, 0)
    with pytest.raises(ConfigError, match=r"none\.csv cannot be read \(No such file or directory\)"):
        Trace(str(tmp_path / "none.csv")).available(5, 0.0, 0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="on_s must be > 0 and <= 10, got 11"):
        Daily(on_s=11, period_s=10)
    with pytest.raises(ConfigError, match="spread_s must be >= 0 and <= 10, got 11"):
        Daily(on_s=1, period_s=10, spread_s=11)
    with pytest.raises(ConfigError, match="path must name a file, got ''"):
        Trace("")
    with pytest.raises(ConfigError, match="period_s must be > 0, got 0"):
        Trace("x.csv", period_s=0)
