"""What a variant is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lab.aptrepo import AptRepo
from lab.state import Run, Target
from lab.tailnet import Tailnet


@dataclass(frozen=True)
class Around:
    """The run's services, up."""

    tailnet: Tailnet
    repository: AptRepo


def _no_keys(_run: Run, _target: Target) -> Mapping[str, Any]:
    return {}


def _nothing(_run: Run, _target: Target, _around: Around) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """A way in which a host is not blank."""

    name: str
    what: str
    """A sentence for people."""
    script: Callable[[Run, Target, Around], str]
    """Shell text, run as root on the target with `sh -eu`."""
    here: Callable[[Run, Target, Around], None] = _nothing
    """What is done from this machine, before the script. Raises LabError."""
    keys: Callable[[Run, Target], Mapping[str, Any]] = _no_keys
    """What its entry in hosts.toml needs besides; None takes a key away."""
    kinds: tuple[str, ...] = ("container", "vm")
    distros: tuple[str, ...] = ("trixie", "bookworm")
    conflicts: frozenset[str] = frozenset()
    """Variants it cannot share a target with."""


def fixed(text: str) -> Callable[[Run, Target, Around], str]:
    """A script that is the same on every target."""
    return lambda _run, _target, _around: text
