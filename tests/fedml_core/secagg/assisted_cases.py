"""What the tests of assisted sums share: identities, and a whole sum that can be stopped or spoilt anywhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assistant import AssistantSession
from fedml_core.secagg.assisted_client import AssistedClient
from fedml_core.secagg.assisted_server import AssistedServer
from fedml_core.secagg.masks import ring_type
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party

BINDING = b"m" * 32
FIRST_ASSISTANT = 100


class Assisted:
    """One sum: `members` clients 0.., `assistants` assistants 100.., with every session at hand."""

    def __init__(
        self,
        members: int = 4,
        assistants: int = 3,
        threshold: int = 1,
        *,
        lying: int = 0,
        each: int = 1,
        **changes: Any,
    ) -> None:
        numbers = tuple(FIRST_ASSISTANT + place for place in range(assistants))
        self.assistance = Assistance(numbers, threshold, lying)
        plain = Parameters(
            run="r",
            round=3,
            attempt=0,
            length=50,
            bits=32,
            encoding=self.assistance.within({"clip": 1.0}),
            minimum=2,
            corrupt_share=0.0,
            dropout_share=0.0,
            roster="ab",
        )
        self.parameters = replace(plain, **changes)
        self.identities = {one: Ed25519PrivateKey.generate() for one in (*range(members), *numbers)}
        self.roster = {one: key.public_key().public_bytes_raw() for one, key in self.identities.items()}
        self.server = AssistedServer(self.parameters, range(members), self.roster, each=each)
        self.assistants = {one: self.assistant(one) for one in numbers}
        dtype = ring_type(self.parameters.bits)
        rng = np.random.default_rng(7)
        size = self.parameters.length * dtype.itemsize
        self.vectors = {one: np.frombuffer(rng.bytes(size), dtype) for one in range(members)}

    def assistant(self, number: int, **options: Any) -> AssistantSession:
        return AssistantSession(self.parameters, self.party(number), **options)

    def client(self, member: int) -> AssistedClient:
        return AssistedClient(self.parameters, self.party(member))

    def party(self, number: int) -> Party:
        return Party(number, self.roster, self.identities[number].sign)

    def advertise(self, absent: Collection[int] = ()) -> None:
        for one, session in self.assistants.items():
            if one not in absent:
                self.server.receive_advert(one, session.advertise())
        panel = self.server.close_adverts(BINDING).to_bytes
        for one in self.server.live:
            session = self.assistants[one]
            session.join(session.read_panel(panel), BINDING)

    def masked(self, member: int) -> tuple[bytes, NDArray[Any]]:
        client, vector = self.client(member), self.vectors[member].copy()
        return client.contribute(client.read_panel(self.server.panel.to_bytes), BINDING, vector), vector

    def contribute(self, members: Sequence[int] | None = None) -> None:
        for member in self.vectors if members is None else members:
            self.server.receive_contribution(member, *self.masked(member))

    def gather(self) -> None:
        for one in self.server.live:
            self.server.receive_gathered(one, self.assistants[one].gather(self.server.roundup(one)))

    def witness(self) -> bytes:
        message = self.server.close_contributions()
        for one in self.server.live:
            self.server.receive_witness(one, self.assistants[one].witness(message))
        return message

    def answer(self, requests: Mapping[int, tuple[bytes, ...]] | None = None) -> None:
        for one, listed in (self.server.requests() if requests is None else requests).items():
            for request in listed:
                self.server.receive_answer(one, *self.assistants[one].answer(request))

    def run(self) -> NDArray[Any]:
        """Take the sum to its end and return it."""
        self.advertise()
        self.contribute()
        self.gather()
        self.witness()
        self.answer()
        return self.server.total()

    def expected(self, members: Collection[int] | None = None) -> NDArray[Any]:
        dtype = ring_type(self.parameters.bits)
        chosen = [self.vectors[member] for member in (self.vectors if members is None else members)]
        total: NDArray[Any] = np.sum(np.stack(chosen), axis=0, dtype=dtype)
        return total
