"""The beginning of a server's session of an assisted sum: the assistants' adverts become a panel.

Guarantees: no assistant's advert can stop the others: what each party would refuse is refused as it arrives.
Trust: it sees public keys only.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedml_core.errors import SecureAggregationError
from fedml_core.secagg.adverts import Verify
from fedml_core.secagg.assisted import AssistantAdvert, Panel
from fedml_core.secagg.parameters import Parameters

__all__ = ["AdvertDesk", "require"]


def require(held: bool, message: str) -> None:
    """Raise SecureAggregationError with the message unless something holds."""
    if not held:
        raise SecureAggregationError(message)


class AdvertDesk:
    """Collects the adverts of one session's assistants."""

    def __init__(self, parameters: Parameters, roster: Mapping[int, bytes], verify: Verify) -> None:
        self._parameters, self._roster, self._verify = parameters, roster, verify
        self._adverts: dict[int, AssistantAdvert] = {}
        self._panel: Panel | None = None

    @property
    def closed(self) -> bool:
        """Return whether there is a panel."""
        return self._panel is not None

    @property
    def panel(self) -> Panel:
        """Return the panel, once adverts are closed."""
        if self._panel is None:
            raise SecureAggregationError("the assistants' adverts are still being collected")
        return self._panel

    @property
    def adverts(self) -> tuple[AssistantAdvert, ...]:
        """Return the adverts that came, by ascending assistant."""
        return tuple(self._adverts[assistant] for assistant in sorted(self._adverts))

    def receive(self, assistant: int, message: bytes) -> None:
        """Take an assistant's advert.

        Raises: SecureAggregationError: if it is not this assistant's own, its first, or signed by it.
        """
        advert = AssistantAdvert.from_bytes(message)
        require(not self.closed, "an assistant's advert came after the panel")
        require(assistant not in self._adverts, f"assistant {assistant} advertised twice")
        require(advert.assistant == assistant, f"assistant {assistant} advertises as assistant {advert.assistant}")
        advert.check(self._parameters, self._roster, self._verify)
        for other in self._adverts.values():
            if {advert.sealing_key, advert.nonce}.intersection((other.sealing_key, other.nonce)):
                raise SecureAggregationError(f"assistant {assistant} advertises a key or nonce of another")
        self._adverts[assistant] = advert

    def close(self) -> Panel:
        """Return the panel of all that advertised.

        Raises: ThresholdError: if they are fewer than a quorum.
        """
        require(not self.closed, "the assistants' adverts are closed already")
        self._panel = Panel.checked(self._parameters, self.adverts, self._roster, self._verify)
        return self._panel
