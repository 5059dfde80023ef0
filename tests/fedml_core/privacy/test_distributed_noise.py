"""Noise from clients stands last in a pipeline, says what it costs, and lets no sum pass that comes without it."""

from __future__ import annotations

import math

import pytest
import torch

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.distributed_noise import DistributedNoise, noise_in
from fedml_core.privacy.events import checked
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.privacy.noised_encoding import NoisedEncoding
from fedml_core.ring import total_of
from fedml_core.transform import Chain, Draws, Transform, chain
from fedml_core.update import Total
from fedml_core.weighting import ByExamples, Uniform, Weigh
from strategies.server_optimizers import ServerStep

NOISE = DistributedNoise(2.0, 8, 10, 4)
PIPELINE = chain(Weigh(Uniform()), ClipByNorm(0.5), NOISE)
DRAWS = Draws.of("test")


def total(**facts: float) -> Total:
    return Total(torch.arange(8.0), 6.0, 6, {"examples": 60.0}, facts)


def test_noise_is_calibrated_to_the_clipping_before_it() -> None:
    noise = noise_in(PIPELINE)
    assert noise is not None and noise.bound == 0.5
    encoding = noise.encoding()
    assert encoding == NoisedEncoding(8, 10, 4, 0.5, 2.0)
    assert encoding.local_noise * math.sqrt(4) == pytest.approx(1.0)
    assert noise_in(chain(Weigh(Uniform()), ClipByNorm(0.5))) is None


def test_the_pipeline_reports_what_its_clients_draw() -> None:
    event = PIPELINE.event()
    assert event is not None and checked(event)["events"] == [NoisedEncoding(8, 10, 4, 0.5, 2.0).event()]


def test_noise_without_a_bound_or_with_anything_behind_it_is_refused() -> None:
    # "noise without a finite bound to its left, or with what changes the sum to its right, raises PrivacyError."
    for left in (Chain(), Weigh(ByExamples())):
        with pytest.raises(PrivacyError, match="no finite bound to calibrate to; put ClipByNorm before it"):
            chain(left, NOISE)
    for right in (Weigh(Uniform()), ServerStep(0.5), ServerGaussian(1.0, 4.0), NOISE):
        with pytest.raises(PrivacyError, match="must come last"):
            chain(ClipByNorm(0.5), NOISE, right)
    with pytest.raises(PrivacyError, match="chain it after ClipByNorm"):
        NOISE.event()


def test_what_changes_the_length_before_the_noise_is_refused() -> None:
    class _Longer(Transform):
        def encoded_size(self, size: int) -> int:
            return size + 1

    with pytest.raises(PrivacyError, match="longer or shorter"):
        chain(_Longer(), ClipByNorm(0.5), NOISE)


def test_a_sum_that_carries_too_little_noise_goes_no_further() -> None:
    # "a sum of updates that carries less noise than this raises PrivacyError and goes no further."
    # "server sees only noised sums."
    state = PIPELINE.init(ModelSpec.of_size(8))
    for short in (total(), total(clipped=0.0), total(noise=0.999), total(noise=math.nan)):
        with pytest.raises(PrivacyError, match="without its clients' noise"):
            PIPELINE.decode(short, state, DRAWS)
    decoded, _ = PIPELINE.decode(total(noise=1.0), state, DRAWS)
    # "the mean is divided by `cohort_size`, whoever stays away."
    assert torch.equal(decoded.values, torch.arange(8.0) / 10)
    assert not decoded.sums


def test_what_the_encoding_decodes_is_what_the_noise_lets_pass() -> None:
    noise = noise_in(PIPELINE)
    assert noise is not None
    encoding = noise.encoding()
    rows = encoding.encode_rows(torch.zeros(6, 8).numpy())
    summed = total_of(encoding.decode(rows.sum(axis=0, dtype=rows.dtype), 6))
    decoded, _ = noise.decode(summed, {}, DRAWS)
    assert decoded.weight == 10.0 and bool(torch.isfinite(decoded.values).all())


def test_a_model_of_another_size_is_refused_before_the_first_round() -> None:
    with pytest.raises(ConfigError, match="planned for 8 values and the model has 9; set size=9"):
        PIPELINE.init(ModelSpec.of_size(9))


def test_sites_are_told_what_noise_their_share_is_part_of() -> None:
    half = PIPELINE.client_half()
    assert half is not None and half.event() == PIPELINE.event()
    read = Transform.from_config(half.to_config())
    assert read == half and noise_in(Chain((read,))) == noise_in(PIPELINE)


def test_a_sum_has_one_noise() -> None:
    with pytest.raises(PrivacyError, match="a sum carries one noise, and the pipeline names 2"):
        noise_in(Chain((NOISE, Chain((NOISE,)))))
