"""Errors an operator reads: what is wrong, where, and the next step."""

from __future__ import annotations

from pyinfra.api.exceptions import PyinfraError


class QuietportError(PyinfraError):
    """An error with a next step. pyinfra prints it as one sentence, without a traceback.

    `what` says what is wrong and where (host, setting, file); `hint` is the next step.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"{what} {hint}".strip())


class SettingsError(QuietportError):
    """hosts.toml, or a value in it, cannot be used."""


class SecretError(QuietportError):
    """A secret's source is absent, fails, or prints nothing."""


class ReachError(QuietportError):
    """A host cannot be reached, or is not the one that was pinned."""
