"""Errors that say what, the values, why, and what to do next.

Every error a user can cause is a :class:`CropiError`; each subclass is also the builtin that a caller would
expect, so ``except ValueError`` keeps working in a notebook. The command line maps them to exit codes: 2 when
the command or the configuration was wrong, 1 when the work failed.
"""

from pydantic import ValidationError


class CropiError(Exception):
    """Base of every error that cropi raises on purpose."""

    exit_code = 1


class ConfigError(CropiError, ValueError):
    """The configuration or the command is wrong; nothing was run."""

    exit_code = 2


class DataError(CropiError, ValueError):
    """An input table, file or dataset does not hold what its format promises."""


class PolicyError(CropiError, ValueError):
    """A checkpoint is missing, foreign or cannot be used."""


class ArtifactError(CropiError, RuntimeError):
    """A stored artifact is missing, damaged or of an unknown schema version."""


class ProjectionError(CropiError, ArithmeticError):
    """The projection's self-test failed, or a parameter is out of its reach."""


class SelectionError(CropiError, ValueError):
    """A subset cannot be chosen from these scores."""


class DeclinedError(CropiError, RuntimeError):
    """A person who was asked declined a selection; nothing was trained on it."""


class WaitingError(CropiError, RuntimeError):
    """A run was put away until a person has answered; it goes on from there."""


class StepError(CropiError, RuntimeError):
    """A step failed in its own process; carries what that process said last."""


class ServerError(CropiError, RuntimeError):
    """A server that samples failed, serves something else, or answers what cannot be used; says which and what."""


def in_one_line(error: ValidationError) -> str:
    """Say every fault that Pydantic found as ``field.field: what is wrong``, without its pages of advice."""
    faults = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors(include_url=False)]
    return "; ".join(f"{field}: {text}" if field else text for field, text in faults)
