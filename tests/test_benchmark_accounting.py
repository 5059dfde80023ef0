from __future__ import annotations

from benchmarks.accounting import measure


def test_the_benchmark_of_the_accountants_measures_what_it_says() -> None:
    row = measure(count=10, steps=20, ledger=30)
    assert {"calibrate_s", "steps_s", "ledger_s"} <= row.keys()
    assert (row["rounds"], row["steps"], row["ledger_rounds"]) == (10, 20, 30)
    # Ten rounds at a tenth need less noise than one round of everybody at epsilon 4, which is 1.08.
    assert 0.5 < row["noise_multiplier"] < 1.08 and 0 < row["steps_epsilon"] < 2.4
