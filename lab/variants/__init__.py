"""Hosts that are not blank: what was done to them before anybody thought of quietport.

A variant is a script that runs on a blank target as root, and the keys its entry in hosts.toml then needs.
Several can be combined on one target, in the order they are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lab import targets
from lab.process import LabError
from lab.state import Run, Target
from lab.variants.machine import VARIANTS as MACHINE
from lab.variants.model import Around, Variant
from lab.variants.ssh import VARIANTS as SSH

__all__ = ["ALL", "DETAIL", "Around", "Variant", "apply", "check", "keys_of", "named", "of"]

_MODULES: tuple[Iterable[Variant], ...] = (SSH, MACHINE)
ALL: Mapping[str, Variant] = {variant.name: variant for module in _MODULES for variant in module}

# The key in a target's detail that has the names of its variants, with commas.
DETAIL = "variants"
# A variant may install packages, in an emulated VM.
SCRIPT_TIMEOUT_S = 900


def named(names: Sequence[str]) -> list[Variant]:
    """The variants of these names. Raises LabError for one that does not exist."""
    for name in names:
        if name not in ALL:
            raise LabError(f"No variant {name!r}.", hint=f"There are: {', '.join(sorted(ALL)) or 'none'}.")
    return [ALL[name] for name in names]


def check(names: Sequence[str], *, kind: str, distro: str) -> None:
    """Raises LabError when these variants cannot be had together on such a target."""
    variants = named(names)
    for variant in variants:
        if kind not in variant.kinds or distro not in variant.distros:
            raise LabError(
                f"The variant {variant.name} is for {' and '.join(variant.kinds)} with "
                f"{' and '.join(variant.distros)}, not for {kind} with {distro}."
            )
        for other in names:
            if other in variant.conflicts:
                raise LabError(f"The variants {variant.name} and {other} cannot be had on one target.")


def of(target: Target) -> list[Variant]:
    """The variants a target has."""
    return named([name for name in target.detail.get(DETAIL, "").split(",") if name])


def apply(run_: Run, target: Target, around: Around) -> None:
    """Make a blank target what its variants say. Raises LabError when one of them cannot be had."""
    for variant in of(target):
        variant.here(run_, target, around)
        text = variant.script(run_, target, around)
        targets.execute(run_, target, ["sh", "-euc", text], timeout=SCRIPT_TIMEOUT_S)


def keys_of(run_: Run, target: Target) -> dict[str, Any]:
    """What the variants add to the target's entry in hosts.toml."""
    keys: dict[str, Any] = {}
    for variant in of(target):
        keys |= variant.keys(run_, target)
    return keys
