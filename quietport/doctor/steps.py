"""What checks share: how a next step is worded, and how long a program of the host may take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from quietport.doctor.model import Finding

# A program that takes longer has not told.
COMMAND_S = 5.0
UNIT = "quietport-doctor.service"
LOOK_NOW = f"`systemctl start {UNIT}`"
NOT_CONVERGED = Finding("SKIP", "There is no /etc/quietport/host.json: no converge has been here.")


def name_of(declared: Mapping[str, Any]) -> str:
    """The host's name in hosts.toml; "this host" where no converge has been."""
    return str(declared.get("name") or "this host")


def apply(declared: Mapping[str, Any]) -> str:
    """The step that brings the declared state back."""
    return f"On your machine: `quietport apply {shlex.quote(str(declared.get('name') or 'NAME'))}`."
