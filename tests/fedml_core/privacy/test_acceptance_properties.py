"""The properties that `benchmarks.privacy_properties` runs at full size, at a small one; and that it can fail."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import privacy_properties
from fedml_core.privacy.discrete import DiscreteGaussian
from fedml_core.privacy.entropy import NoiseStream


def test_claims_about_random_runs_are_never_below_the_exact_cost() -> None:
    found = privacy_properties.accounting(4)
    assert 1.0 <= found["least"] <= found["largest"] <= 1.01


def test_the_noise_of_a_sum_is_there_whoever_drops_out_and_nothing_wraps() -> None:
    # 2^18 coordinates give the deviation to 0.14 %.
    found = privacy_properties.dropouts(1 << 18, 10)
    assert list(found) == ["0%", "10%", "30%", "50%"]
    assert privacy_properties.wraps(4, 2)["outside"] == 0


def test_a_clip_norm_finds_its_quantile_from_five_beginnings() -> None:
    assert len(privacy_properties.adaptive()) == 5


def test_less_noise_than_configured_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DiscreteGaussian.draw

    def less(self: DiscreteGaussian, stream: NoiseStream, count: int) -> NDArray[np.int64]:
        drawn: NDArray[np.int64] = np.rint(honest(self, stream, count) * 0.97).astype(np.int64)
        return drawn

    monkeypatch.setattr(DiscreteGaussian, "draw", less)
    with pytest.raises(SystemExit, match="A9 fails: with 6 of 6 clients the noise is"):
        privacy_properties.dropouts(1 << 16, 6)
