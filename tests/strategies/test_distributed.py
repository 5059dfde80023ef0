"""Distributed DP around additive strategies: refused wherever its noise would not protect, and a run like any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedml_core import ConfigError, PrivacyError, RunError, Training
from fedml_core.compression import TopK
from fedml_core.model import ModelSpec
from fedml_core.privacy.integer_noise import SkellamIntegers
from fedml_core.weighting import Uniform
from server import History, RoundReport
from simulations import Faults, Fused, Processes, Sequential, Vectorised, simulate
from simulations.engines.engine import Engine
from strategies import (
    CentralDP,
    Compressed,
    DistributedDP,
    FedAdam,
    FedAvg,
    FedMedian,
    SecAggPlus,
    SecureAggregation,
    Strategy,
)
from tests.simulations.two_classes import TASK, dense

SIZE, CLIENTS, HONEST = 66, 12, 7
MEAN = FedAvg(weighting=Uniform())


def private(inner: Strategy = MEAN, **changes: Any) -> DistributedDP:
    fields = {"clip_norm": 1.0, "noise_multiplier": 0.02, "delta": 1e-3, "size": SIZE, "cohort_size": CLIENTS}
    return DistributedDP(inner, **{**fields, "honest": HONEST, **changes})


def secure(inner: Strategy | None = None, *, draw_masks: bool = True, **protocol: Any) -> SecureAggregation:
    chosen = SecAggPlus(**{"corrupt_share": 0.1, "dropout_share": 0.3, "minimum": 8, **protocol})
    return SecureAggregation(inner or private(), chosen, draw_masks=draw_masks)


def run(strategy: Strategy, engine: Engine | None = None, **changes: Any) -> History:
    common: dict[str, Any] = {"clients": CLIENTS, "rounds": 1, "training": Training(batch_size=7), "seed": 4}
    return simulate(TASK, strategy, engine=engine or Sequential(), **{**common, **changes})


def watched(strategy: Strategy, **changes: Any) -> list[RoundReport]:
    seen: list[RoundReport] = []
    run(strategy, callbacks=[lambda report, state: seen.append(report)], **changes)
    return seen


@pytest.mark.parametrize(
    "engine",
    [Sequential(), Vectorised(clients_at_once=5), Fused(clients_at_once=5), Processes(workers=2, inner=Sequential())],
    ids=lambda engine: str(engine.name),
)
def test_every_engine_comes_to_the_private_mean_and_noise_of_the_planned_size(engine: Engine) -> None:
    found, clear = run(secure(), engine), run(MEAN, engine)
    residual = (found.parameters - clear.parameters).double()
    # 12 shares of 0.02 / sqrt(7), over a mean of 12; 66 coordinates give it to 9 %.
    planned = 0.02 * (12 / 7) ** 0.5 / 12
    assert 0.65 * planned < float(residual.std()) < 1.4 * planned


def test_a_report_names_the_protection_and_what_it_has_cost() -> None:
    seen = watched(secure(), rounds=2)
    assert seen[0].protection == (
        "secure aggregation (SecAgg+, active server) + distributed DP (client level, GaussianIntegers, noise "
        "multiplier 0.02 from any 7 honest clients, 16-bit sums)"
    )
    first, second = (report.privacy for report in seen)
    assert first is not None and second is not None and first["epsilon"] < second["epsilon"]
    assert (first["unit"], first["adjacency"], first["sampling"], first["delta"]) == (
        "client",
        "replace-special",
        "none",
        1e-3,
    )


def test_metrics_that_would_tell_what_the_noise_hides_are_not_summed() -> None:
    report = watched(secure())[0]
    assert report.metrics["train"] == {} and "accuracy" in report.metrics["server"]


def test_a_run_without_masks_adds_the_noise_all_the_same_and_says_so() -> None:
    masked, unmasked = (run(secure(draw_masks=draw)) for draw in (True, False))
    assert "simulated without masks" in unmasked.reports[0].protection
    difference = float((masked.parameters - unmasked.parameters).double().std())
    assert difference > 0.02 * (12 / 7) ** 0.5 / 12  # both carry noise, and not the same


def test_clients_that_drop_out_are_noised_for_down_to_the_minimum_and_void_below() -> None:
    seen = watched(secure(dropout_share=0.1), rounds=8, faults=Faults(drop=0.3))
    done, void = ([report for report in seen if report.status == status] for status in ("ok", "void"))
    assert done and void and len(done) + len(void) == 8
    assert all(len(report.participants) >= 8 for report in done)
    assert any(len(report.participants) < CLIENTS for report in done)
    # A round that was begun is counted, whatever came of it.
    epsilons = [report.epsilon or 0.0 for report in seen]
    assert epsilons == sorted(set(epsilons))


@pytest.mark.parametrize("changes", [{"bits": 20}, {"bits": 32}, {"noise": SkellamIntegers()}], ids=str)
def test_other_rings_and_noises_are_settings_of_the_same_run(changes: dict[str, Any]) -> None:
    found = run(secure(private(FedAdam(weighting=Uniform()), **changes)))
    assert found.reports[0].status == "ok"


def test_it_is_named_and_comes_back_from_its_configuration() -> None:
    strategy = secure(private(noise=SkellamIntegers(), bits=20))
    assert Strategy.from_config(strategy.to_config()) == strategy
    assert strategy.privacy() == private().privacy()


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: run(private()), PrivacyError, "adds noise of 0.00756 alone, which protects nobody; wrap it: Secure"),
    (lambda: private().aggregate(torch.zeros(SIZE), []), PrivacyError, "which protects nobody"),
    (lambda: SecureAggregation(private()), PrivacyError, "raise the protocol's minimum to 8, or lower honest"),
    (lambda: secure(minimum=7), PrivacyError, "7 clients of whom 1 may collude has the noise of 6 honest"),
    (lambda: secure(corrupt_share=0.2), PrivacyError, "8 clients of whom 2 may collude has the noise of 6 honest"),
    (lambda: SecureAggregation(private(), SecAggPlus(minimum=8), bits=16), ConfigError, "leave out bits"),
    (lambda: SecureAggregation(private(), SecAggPlus(minimum=8), clip=0.5), ConfigError, "leave out clip"),
    (lambda: private(secure()), PrivacyError, "the noise belongs inside the secure sum"),
    (lambda: private(private()), PrivacyError, "is private already"),
    (lambda: private(CentralDP(MEAN, 1.0, 1.0, 10, 1e-5)), PrivacyError, "is private already"),
    (lambda: private(FedMedian()), PrivacyError, "does not add updates up"),
    (lambda: private(FedAvg()), PrivacyError, "give it weighting=Uniform"),
    (lambda: private("FedAvg"), ConfigError, "DistributedDP wraps a strategy, got 'FedAvg'"),  # type: ignore[arg-type]  # as a user might
    (lambda: Compressed(private(), TopK(0.5)), PrivacyError, "must come last: TopK after it"),
    (lambda: private(delta=0.0), ConfigError, "delta must be > 0"),
    (lambda: private(clip_norm=0), ConfigError, "clip_norm must be"),
    (lambda: private(bits=24), ConfigError, "bits must be 16, 20 or 32"),
    (lambda: private(honest=13), ConfigError, "honest must be >= 1 and <= 12"),
    (lambda: private(noise=1.0), ConfigError, "noise must be GaussianIntegers or SkellamIntegers"),
    (lambda: private(cohort_size=10**6), ConfigError, "use more bits, or smaller cohorts"),
    (lambda: run(secure(private(size=60))), ConfigError, "the model has 66; set size=66"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_would_protect_less_than_it_says_is_refused(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_cohort_larger_than_planned_is_void_before_anybody_trains() -> None:
    small = secure(private(cohort_size=11))
    seen: list[RoundReport] = []
    # As far as a run can know, one of the 12 may be away in each round; here nobody is.
    away = Faults(unavailable=1e-9)
    with pytest.raises(RunError, match="12 clients are in a sum that has room for 11; ask fewer"):
        run(small, faults=away, callbacks=[lambda report, state: seen.append(report)])
    assert seen[0].status == "void" and seen[0].replies == 0


def test_a_compression_before_the_clipping_is_as_private() -> None:
    inner = Compressed(MEAN, TopK(0.5))
    assert secure(private(inner)).pipeline().event() == secure().pipeline().event()


def test_more_honest_clients_are_asked_for_less_noise_each_and_cost_the_same() -> None:
    few, many = private(honest=3), private(honest=12)
    ratio = [event["events"][0]["local_noise"] for one in (few, many) if (event := one.pipeline().event())]
    assert ratio[0] == pytest.approx(2 * ratio[1])
    assert dataclasses.replace(few, honest=12) == many
    assert few.pipeline().encoded_size(SIZE) == SIZE == ModelSpec.of(dense()).size
