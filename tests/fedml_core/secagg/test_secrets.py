"""What `fedml_core.secagg.secrets` promises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.secrets import Secret

VALUE = bytes(range(1, 33))


@pytest.mark.parametrize("show", [repr, str, format, lambda s: f"{s:>40}", lambda s: f"{s!r}", lambda s: "%s" % s])  # noqa: UP031  # the old way is a way, too
def test_no_text_shows_more_than_the_length(show: Callable[[Secret], str]) -> None:
    """Guarantees: no `repr`, text or format of a secret shows more than its length."""
    assert show(Secret(VALUE)) == "Secret(32 bytes)" == show(Secret(bytes(32)))


@pytest.mark.parametrize(
    "use",
    [
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
        hash,
        lambda s: s == s,
        lambda s: s != VALUE,
        lambda s: s in [VALUE],
        bool,
    ],
)
def test_a_secret_is_not_pickled_copied_hashed_or_compared(use: Callable[[Secret], object]) -> None:
    """Guarantees: a secret is never pickled, copied, hashed or compared with `==`: each of these raises."""
    with pytest.raises(SecureAggregationError, match="secret"):
        use(Secret(VALUE))


def test_bytes_of_a_secret_have_to_be_asked_for_by_name() -> None:
    with pytest.raises(TypeError):
        bytes(Secret(VALUE))  # type: ignore[call-overload]  # that is the point


def test_wiping_zeroes_the_memory_and_ends_the_use() -> None:
    """after `wipe` the secret's own memory holds zeros, and every further use but another `wipe` raises."""
    memory = bytearray(VALUE)
    secret = Secret.taking(memory)
    secret.wipe()
    secret.wipe()
    assert memory == bytes(32)
    assert (repr(secret), len(secret), secret.wiped) == ("Secret(wiped)", 0, True)
    for use in (secret.view, secret.array, secret.bytes, lambda: secret.same_as(VALUE)):
        with pytest.raises(SecureAggregationError, match="wiped and cannot be used again"):
            use()


def test_a_block_wipes_its_secret_at_the_end() -> None:
    with Secret(VALUE) as secret:
        assert not secret.wiped
    assert secret.wiped


def test_a_block_wipes_its_secret_when_it_fails() -> None:
    secret = Secret(VALUE)
    with pytest.raises(RuntimeError, match="on purpose"), secret:
        raise RuntimeError("on purpose")
    assert secret.wiped


def test_a_view_does_not_outlive_its_secret() -> None:
    """Guarantees: a view that is kept beyond `wipe` raises ValueError when it is used, and never shows the bytes."""
    secret = Secret(VALUE)
    view = secret.view()
    assert view.readonly
    assert bytes(view) == VALUE
    secret.wipe()
    with pytest.raises(ValueError, match="released"):
        bytes(view)


def test_an_array_that_outlives_its_secret_reads_zeros() -> None:
    secret = Secret(VALUE)
    array = secret.array()
    assert bytes(array) == VALUE
    assert not array.flags.writeable
    secret.wipe()
    assert bytes(array) == bytes(32)


def test_what_was_handed_out_as_bytes_survives_a_wipe() -> None:
    """wiping is hygiene, not proof: Python and the libraries below may have made copies (a `bytes` handed out, a block
    that was swapped to disk, registers, a library's key schedule), and those are out of reach."""
    secret = Secret(VALUE)
    handed_out = secret.bytes()
    secret.wipe()
    assert handed_out == VALUE


def test_a_secret_is_a_copy_of_what_it_was_made_from() -> None:
    source = bytearray(VALUE)
    secret = Secret(source)
    source[0] ^= 1
    assert secret.same_as(VALUE)
    assert secret.same_as(Secret(memoryview(VALUE)))
    assert not secret.same_as(bytes(source))
    assert not secret.same_as(VALUE[:-1])


def test_fresh_secrets_differ_and_have_the_size_asked_for() -> None:
    made = [Secret.fresh(size) for size in (1, 32, 32, 100)]
    assert [len(secret) for secret in made] == [1, 32, 32, 100]
    assert not made[1].same_as(made[2])


@pytest.mark.parametrize("make", [lambda: Secret(b""), lambda: Secret.fresh(0), lambda: Secret.fresh(-1)])
def test_an_empty_secret_is_refused(make: Callable[[], Secret]) -> None:
    with pytest.raises(SecureAggregationError, match="at least one byte"):
        make()
