"""The benchmark of distributed noise measures what it says it does."""

from __future__ import annotations

from benchmarks.distributed_noise import least_seconds, measure


def test_the_figures_of_distributed_noise_are_all_there() -> None:
    row = measure(parameters=700, clients=10)
    assert row["upload_bytes"] == {16: 1536, 20: 2048, 32: 3072}  # 700 are padded to 768
    assert set(row["million_draws_per_s"]) == {"gaussian_16", "gaussian_20", "gaussian_32", "skellam_16"}
    assert set(row["seconds"]) == {"encode_16", "encode_20", "encode_32", "encode_without_noise", "rotate"}
    # Never below the Gaussian mechanism with the same noise, and the nearer the more bits there are.
    assert 4.72 < row["epsilon"][32] <= row["epsilon"][20] <= row["epsilon"][16] < 4.9


def test_contenders_take_turns_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    found = least_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 6 and set(found) == {"a", "b"}
