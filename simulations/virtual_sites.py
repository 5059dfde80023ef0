"""Who the virtual clients of secure sums are: identities of their own, no policy, and what one process does once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from fedml_core.binding import binding_of
from fedml_core.messages import Assignment, SecureWork, TrainWork
from fedml_core.secagg.assisted import Panel
from fedml_core.secagg.bulletin import Bulletin, Verify, verify
from fedml_core.secagg.keys import derive
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.secrets import Secret

__all__ = ["AnySite", "SharedWork", "VirtualRoster"]


class AnySite:
    """A site that takes part in every sum, as its counter and its floor; it outlives no process."""

    def advance(self, run: str, round_number: int, attempt: int) -> None:
        """Accept: this process uses no number twice."""

    def check(self, parameters: Parameters) -> None:
        """Accept."""

    def check_attempts(self, round_number: int, attempts: int) -> None:
        """Accept."""

    def check_members(self, members: int, threshold: int) -> None:
        """Accept."""

    def check_assistants(self, assistants: Sequence[int]) -> None:
        """Accept."""


class SharedWork:
    """What all clients of one process read and check alike, each piece of it once; see `clients.standing.Standing`."""

    def __init__(self) -> None:
        self._bulletins: dict[tuple[bytes, bytes], Bulletin] = {}
        self._panels: dict[tuple[bytes, bytes], Panel] = {}
        self._valid: set[tuple[bytes, bytes, bytes]] = set()
        self._bound: tuple[Tensor, TrainWork | None, bytes] | None = None

    def verify(self, key: bytes, signature: bytes, message: bytes) -> bool:
        """Return whether a signature holds; only one that does is remembered."""
        triple = (key, signature, message)
        if triple not in self._valid and verify(*triple):
            self._valid.add(triple)
        return triple in self._valid

    def read_bulletin(
        self, parameters: Parameters, message: bytes, roster: Mapping[int, bytes], check: Verify
    ) -> Bulletin:
        """Return what a message holds, as `Bulletin.read`."""
        key = (parameters.context, message)
        if key not in self._bulletins:
            self._bulletins[key] = Bulletin.read(parameters, message, roster, check)
        return self._bulletins[key]

    def read_panel(self, parameters: Parameters, message: bytes, roster: Mapping[int, bytes], check: Verify) -> Panel:
        """Return what a message holds, as `Panel.read`."""
        key = (parameters.context, message)
        if key not in self._panels:
            self._panels[key] = Panel.read(parameters, message, roster, check)
        return self._panels[key]

    def bind(self, assignment: Assignment) -> bytes:
        """Return the binding, computed once for members that were given the very same model and work."""
        work = assignment.work
        assert isinstance(work, SecureWork)
        parameters, train, binding = self._bound or (None, None, b"")
        if parameters is not assignment.parameters or train is not work.train:
            binding = binding_of(assignment)
            self._bound = (assignment.parameters, work.train, binding)
        return binding

    def forget(self) -> None:
        """Let go of everything: what belongs to one round is of little use in the next."""
        self._bulletins.clear()
        self._panels.clear()
        self._valid.clear()
        self._bound = None


class VirtualRoster(Mapping[int, bytes]):
    """Identities of virtual clients, made when they are asked for, from one fresh secret for the whole run."""

    digest = "virtual"

    def __init__(self, count: int) -> None:
        self._count, self._root = count, Secret.fresh(32)
        self._keys: dict[int, tuple[Ed25519PrivateKey, bytes]] = {}
        self.shared = SharedWork()

    def __getitem__(self, member: int) -> bytes:
        """Return a member's public identity key."""
        return self._pair(member)[1]

    def __iter__(self) -> Iterator[int]:
        """Return the members."""
        return iter(range(self._count))

    def __len__(self) -> int:
        """Return how many members there are."""
        return self._count

    def sign_as(self, member: int) -> Callable[[bytes], bytes]:
        """Return what signs as a member."""
        return self._pair(member)[0].sign

    def forget(self) -> None:
        """Let go of what belongs to one round; identities stay the same."""
        self._keys.clear()
        self.shared.forget()

    def _pair(self, member: int) -> tuple[Ed25519PrivateKey, bytes]:
        if member not in self._keys:
            if not 0 <= member < self._count:
                raise KeyError(member)
            with derive(self._root, "identity", b"", member) as seed:
                private = Ed25519PrivateKey.from_private_bytes(bytes(seed.view()))
            self._keys[member] = (private, private.public_key().public_bytes_raw())
        return self._keys[member]
