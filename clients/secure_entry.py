"""What a site checks before it takes part in a secure sum, whatever the protocol and its role in it.

Guarantees: a server that asks for less than the site's own floor, or for another roster, is refused before any key is
    made.
Guarantees: an attempt that this client took part in before, in the same role and in whatever process, is refused.
Trust: as `clients.secagg`.
"""

from __future__ import annotations

from clients.standing import Standing
from fedml_core.errors import ConfigError, PrivacyError, RefusalError, SecureAggregationError
from fedml_core.messages import Assignment, SecureWork
from fedml_core.privacy.distributed_noise import noise_in
from fedml_core.privacy.noised_encoding import NoisedEncoding
from fedml_core.ring import Encoding
from fedml_core.secagg.parameters import Parameters

__all__ = ["Attempts", "check_noise", "check_planned", "read_parameters"]

_MOST_PARAMETERS = 64 * 1024


def read_parameters(standing: Standing, assignment: Assignment, text: bytes) -> Parameters:
    """Return the parameters of a sum, once the site's own rules let it.

    Raises: RefusalError: if they do not. SecureAggregationError: if these are no parameters, or of another run.
    """
    if len(text) > _MOST_PARAMETERS:
        raise SecureAggregationError(f"the parameters have {len(text)} bytes, the most is {_MOST_PARAMETERS}")
    parameters = Parameters.from_text(text.decode("utf-8", "replace"))
    if parameters.run != assignment.run:
        raise SecureAggregationError("the parameters are those of another run")
    standing.floor.check(parameters)
    if parameters.active and parameters.roster != standing.digest:
        raise RefusalError(
            "roster",
            f"the server's roster is {parameters.roster[:16]!r}, this site has pinned {standing.digest[:16]!r}; "
            "ask the operator for the newest roster",
        )
    return parameters


class Attempts:
    """Counts the attempts that a client takes part in, in one role: durably, and how many a round has."""

    def __init__(self, standing: Standing, role: str = "") -> None:
        self._standing, self._role = standing, role
        self._tries: dict[int, int] = {}

    def begin(self, parameters: Parameters) -> None:
        """Return once it is on the disk that this client takes part in an attempt.

        Raises: RefusalError: if it did before, or the round was tried too often.
        """
        standing, number = self._standing, parameters.round
        self._tries = {earlier: tries for earlier, tries in self._tries.items() if earlier >= number - 1}
        self._tries[number] = self._tries.get(number, 0) + 1
        standing.floor.check_attempts(number, self._tries[number])
        standing.counter.advance(parameters.run + self._role, number, parameters.attempt)


def check_noise(encoding: Encoding, parameters: Parameters, members: int) -> None:
    """Raise RefusalError if a sum could be revealed that has less noise than its encoding says."""
    if not isinstance(encoding, NoisedEncoding):
        return
    try:
        encoding.admit(members, parameters.minimum, parameters.corrupt(members))
    except PrivacyError as error:
        raise RefusalError("distributed_noise", str(error)) from error


def check_planned(encoding: Encoding, assignment: Assignment) -> None:
    """Check that the sum adds the very noise that the work names, by which a site's policy and ledger go.

    Raises: RefusalError: with rule "distributed_noise", if it does not.
    """
    work = assignment.work
    train = work.train if isinstance(work, SecureWork) else None
    try:
        noise = None if train is None else noise_in(train.pipeline)
        named = None if noise is None else noise.encoding()
    except (ConfigError, PrivacyError) as error:
        raise RefusalError("distributed_noise", f"the work names noise that cannot be added: {error}") from error
    if named != (encoding.rotated("") if isinstance(encoding, NoisedEncoding) else None):
        raise RefusalError(
            "distributed_noise",
            "the secure sum adds other noise than the work names, so this site cannot count what it would cost",
        )
