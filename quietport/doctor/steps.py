"""What the doctor says of a host as a whole; the words of next steps are in quietport/doctor/place.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quietport.doctor.model import Finding

NOT_CONVERGED = Finding("SKIP", "There is no /etc/quietport/host.json: no converge has been here.")


def name_of(declared: Mapping[str, Any]) -> str:
    """The host's name in hosts.toml; "this host" where no converge has been."""
    return str(declared.get("name") or "this host")
