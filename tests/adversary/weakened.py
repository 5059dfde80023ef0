"""Builds of the protocol, each without exactly one of its checks."""

from __future__ import annotations

from typing import Any

import pytest

from fedml_core.secagg import graph
from fedml_core.secagg.bulletin import Bulletin
from fedml_core.secagg.client import ClientSession, Phase
from fedml_core.secagg.graph import Neighbourhood
from fedml_core.secagg.parameters import digest_of


class WithoutOneList(ClientSession):
    """A member that confirms and answers as often as it is asked."""

    def confirm(self, message: bytes) -> bytes:
        self.phase = Phase.MASKED
        return super().confirm(message)

    def unmask(self, quorum: bytes = b"") -> bytes:
        if self._survivors is not None:
            self.phase = Phase.CONFIRMED
        return super().unmask(quorum)

    def wipe(self) -> None:
        """Keep everything."""


def believe_everybody(key: bytes, signature: bytes, message: bytes) -> bool:
    return True


def without_quorum(patch: pytest.MonkeyPatch) -> None:
    """Members answer without proof that others confirmed the same survivors."""
    patch.setattr(ClientSession, "_check_quorum", lambda *_: None)


def without_binding(patch: pytest.MonkeyPatch) -> None:
    """Masks do not depend on the model and the work."""
    for module in ("client", "server"):
        patch.setattr(f"fedml_core.secagg.{module}.bound_id", lambda bulletin, _: digest_of("bound", bulletin.session))


def without_gaps(patch: pytest.MonkeyPatch) -> None:
    """The threshold outnumbers the corrupt in each neighbourhood, not in each two gaps of the ring."""

    def shape(bulletin: Bulletin) -> Neighbourhood:
        p = bulletin.parameters
        return graph.neighbourhood(
            len(bulletin.adverts), p.corrupt_share, p.dropout_share, active=p.active, security_bits=p.security_bits
        )

    patch.setattr(Bulletin, "_shape", property(shape))


def without_connectedness(patch: pytest.MonkeyPatch) -> None:
    """Survivors may fall apart."""
    patch.setattr(Bulletin, "connects", lambda *_: True)


def without_threshold_floor(patch: pytest.MonkeyPatch, threshold: int, degree: int | None = None) -> None:
    """The threshold is what somebody says."""

    def chosen(clients: int, *_: Any, **__: Any) -> Neighbourhood:
        return Neighbourhood(degree or clients - 1, threshold)

    patch.setattr(graph, "neighbourhood", chosen)
