"""Every error that this project raises on purpose, in one tree.

FedveilError
├── ConfigError           a file, key, flag or argument that the user can mend: exit code 2
├── TaskError             the user's task module, model, loss or data is at fault: exit code 2
├── SpecMismatchError     server and client hold different models: exit code 2
├── StrategyError         a strategy, transform or accumulator is composed or used wrongly
│   └── PrivacyError      protection was asked for and cannot be given
├── SecureAggregationError  a secure sum was stopped: a message, a set or a share is not what the protocol says
│   └── ThresholdError    too few take part, or are left, for a secure sum; nothing was revealed
├── ReplyError            one client's reply is unusable; excluded and attributed, never fatal
├── RefusalError          a client's own policy says no
├── ChannelError          the other side cannot be reached, or the connection is not the expected one
├── CheckpointError       a checkpoint or a store is missing, damaged or of another run
└── RunError              a run could not reach its goal: exit code 1

Messages are one lower-case sentence: fact, value, remedy. They never hold updates, weights or secrets.
"""

from __future__ import annotations

__all__ = [
    "ChannelError",
    "CheckpointError",
    "ConfigError",
    "FedveilError",
    "PrivacyError",
    "RefusalError",
    "ReplyError",
    "RunError",
    "SecureAggregationError",
    "SpecMismatchError",
    "StrategyError",
    "TaskError",
    "ThresholdError",
]


class FedveilError(Exception):
    """The root: catch this to catch everything that this project raises on purpose."""

    exit_code = 1


class ConfigError(FedveilError):
    """A file, key, flag or argument that the user can mend."""

    exit_code = 2


class TaskError(FedveilError):
    """The user's task (module, model, loss, data) is at fault."""

    exit_code = 2


class SpecMismatchError(FedveilError):
    """Server and client hold different models."""

    exit_code = 2


class StrategyError(FedveilError):
    """A strategy, transform or accumulator is composed or used wrongly."""

    exit_code = 2


class PrivacyError(StrategyError):
    """Protection was asked for and cannot be given; nothing unprotected was sent instead."""


class SecureAggregationError(FedveilError):
    """A secure sum was stopped: a message, a set or a share is not what the protocol says."""


class ThresholdError(SecureAggregationError):
    """Too few take part, or are left, for a secure sum; nothing was revealed."""


class ReplyError(FedveilError):
    """One client's reply is unusable: it is excluded and attributed, and the round goes on.

    `rule` names the check that failed, in one word that reports and tests can match.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(rule, message)
        self.rule = rule

    def __str__(self) -> str:
        """Return the message without the rule."""
        return str(self.args[1])


class RefusalError(FedveilError):
    """A client's own policy says no; `rule` names it."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(rule, message)
        self.rule = rule

    def __str__(self) -> str:
        """Return the message without the rule."""
        return str(self.args[1])


class ChannelError(FedveilError):
    """The other side cannot be reached, or is not the expected one."""


class CheckpointError(FedveilError):
    """A checkpoint or store is missing, damaged, or belongs to another run."""

    exit_code = 2


class RunError(FedveilError):
    """A run could not reach its goal."""
