"""What `quietport plan` is told by the operations themselves: why a change is due, and how sure that is.

pyinfra's dry run knows of an operation only that it would run a command. The rest is noted here while its
generator is asked, once a host and operation. Where nobody collects, noting does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyinfra.context import host

Certainty = Literal["certain", "depends on an earlier change", "cannot be known"]
CERTAIN: Certainty = "certain"
DEPENDS: Certainty = "depends on an earlier change"
UNKNOWN: Certainty = "cannot be known"


@dataclass
class Note:
    """What one operation says of the change it would make to one host. Never a secret."""

    name: str = ""
    reasons: list[str] = field(default_factory=list)
    """What of the host is not as declared, a phrase each."""
    certainty: Certainty = CERTAIN
    on: str = ""
    """The earlier change it depends on, or why it cannot be known."""
    differences: dict[str, str] = field(default_factory=dict)
    """{path: unified difference} of the texts it would write."""
    leaves_host: bool = False
    """It would leave the host as it is: it waits for something, or this machine has to learn something."""
    refused: str = ""
    """Why a converge would end with it, as a sentence."""


@dataclass
class Notes:
    """Everything noted in one dry run, by host."""

    of: dict[str, dict[str, Note]] = field(default_factory=dict)
    """{host: {hash of the operation: note}}, for each of our operations that was asked."""
    brought: dict[str, set[str]] = field(default_factory=dict)
    """{host: {what changes of this plan bring about}}"""
    remarks: dict[str, list[str]] = field(default_factory=dict)
    """{host: [sentence]}: what is no change and no error."""


# One command a process collects, from its beginning to its end.
_collected: list[Notes] = []


def collect() -> Notes:
    """Collect from here on, and return where."""
    _collected[:] = [Notes()]
    return _collected[0]


def forget() -> None:
    """Collect no more."""
    _collected.clear()


def collecting() -> bool:
    """Whether a plan is being made of what is noted."""
    return bool(_collected) and not host.state.is_executing


def begin() -> None:
    """An operation is asked what it would do to this host."""
    if collecting() and host.current_op_hash is not None:
        arguments: Mapping[str, Any] = host.current_op_global_arguments or {}
        notes = _collected[0].of.setdefault(host.name, {})
        notes[host.current_op_hash] = Note(name=str(arguments.get("name") or ""))


def _note() -> Note:
    """The note of the operation that is being asked; one that nobody reads where nobody collects."""
    if not collecting():
        return Note()
    return _collected[0].of.get(host.name, {}).get(host.current_op_hash or "", Note())


def because(*reasons: str) -> None:
    """What of the host is not as declared, a phrase each, for the operation that is asked now."""
    note = _note()
    note.reasons += [reason for reason in reasons if reason not in note.reasons]


def depends(on: str) -> None:
    """The change is there, or is what it is, because of an earlier one of the plan, `on`."""
    note = _note()
    if note.certainty == CERTAIN:
        note.certainty, note.on = DEPENDS, on


def brings(what: str) -> None:
    """The change brings `what` about, on which later ones of the plan may depend."""
    if collecting():
        _collected[0].brought.setdefault(host.name, set()).add(what)


def after(what: str) -> None:
    """The change depends on an earlier one, if one of this plan brings `what` about."""
    if collecting() and what in _collected[0].brought.get(host.name, ()):
        depends(what)


def unknown(why: str) -> None:
    """Whether or what it changes cannot be told before it is done, and `why`. Says more than `depends`."""
    note = _note()
    note.certainty, note.on = UNKNOWN, why


def leaves_host() -> None:
    """What the operation would do changes nothing on the host: it waits, or this machine learns something."""
    _note().leaves_host = True


def difference(path: str, text: str) -> None:
    """How the text of `path` would change, as a unified difference. Never one with a secret."""
    if text:
        _note().differences[path] = text


def remark(sentence: str) -> None:
    """A sentence about this host that is no change and no error."""
    if collecting():
        sentences = _collected[0].remarks.setdefault(host.name, [])
        if sentence not in sentences:
            sentences.append(sentence)


def refusal(sentence: str) -> None:
    """Why a converge of this host would end with the operation that is asked now."""
    _note().refused = sentence
