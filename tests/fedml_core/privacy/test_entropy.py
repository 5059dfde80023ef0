"""Noise streams: where their keys come from, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedml_core.errors import ConfigError, PrivacyError, SecureAggregationError
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.terms import Terms, epsilon_text

KEY = bytes(range(32))


def test_every_fresh_stream_has_a_key_of_its_own_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    # "every stream of `fresh` has its own key of 32 bytes from the operating system, and no seed can choose it."
    asked: list[int] = []

    def drawn(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    monkeypatch.setattr("os.urandom", drawn)
    first, second = NoiseStream.fresh().words(4), NoiseStream.fresh().words(4)
    assert asked == [32, 32]
    assert first.tolist() == NoiseStream(b"\1" * 32).words(4).tolist()
    assert not set(first.tolist()) & set(second.tolist())
    with pytest.raises(TypeError):
        NoiseStream.fresh(1)  # type: ignore[call-arg]  # there is no seed


def test_words_are_those_of_aes_and_none_comes_twice() -> None:
    # "equal keys give equal words, those of AES-256-CTR, and a stream never gives the same word twice."
    count = 100_000  # several chunks
    plain = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
    stream = NoiseStream(KEY)
    words = np.concatenate([stream.words(10), stream.words(count - 10)])
    assert words.tobytes() == plain
    assert len(np.unique(words)) == count  # by chance, two of 10^5 words agree with probability 10^-10


@pytest.mark.parametrize("action", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_is_neither_copied_nor_stored_nor_printed(action: Callable[[object], object]) -> None:
    # "whoever knows a stream's key can take its noise off again, so a key is neither logged, sent nor printed."
    stream = NoiseStream(KEY)
    with pytest.raises(PrivacyError, match="a noise stream is neither copied nor stored"):
        action(stream)
    assert repr(stream) == str(stream) == "NoiseStream()"


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(SecureAggregationError, match="must have 32 bytes, got 8"):
        NoiseStream(b"too short"[:8])


@given(st.floats(min_value=0, max_value=1e9))
def test_an_epsilon_is_printed_rounded_up(epsilon: float) -> None:
    # "the number that is printed is at least `epsilon`."
    # "none is needed; it computes on what it is given."
    rounding = 1e-15 * epsilon  # of a double
    assert -rounding <= float(epsilon_text(epsilon)) - epsilon <= 1.01e-4 + rounding
    assert epsilon_text(math.inf) == "infinity"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 0.0}, "delta must be > 0 and < 1, got 0.0"),
        ({"delta": 1.0}, "delta must be > 0 and < 1, got 1.0"),
        ({"delta": 1e-5, "unit": "household"}, "got 'household'"),
        ({"delta": 1e-5, "adjacency": "any"}, "got 'client' and 'any'"),
        ({"delta": 1e-5, "separation": 0}, "separation must be >= 1, got 0"),
        ({"delta": 1e-5, "rounds": 0}, "rounds must be >= 1, got 0"),
    ],
)
def test_terms_that_nobody_could_account_for_are_refused(wrong: dict[str, object], message: str) -> None:
    # "a delta outside (0, 1), and a unit or adjacency that no accountant knows, are refused."
    # "terms are public; they repeat what the strategy was constructed with."
    assert Terms(delta=1e-5) == Terms(delta=1e-5, unit="client", adjacency=None)
    with pytest.raises(ConfigError, match=message):
        Terms(**wrong)  # type: ignore[arg-type]  # wrong on purpose
