"""The hosts pyinfra is given: names, and what may be printed of their settings."""

from __future__ import annotations

import sys
from typing import Any

from control.errors import QuietportError
from control.settings import fleet


def hosts_or_exit() -> list[tuple[str, dict[str, Any]]]:
    """The same for pyinfra's command line: what is wrong with hosts.toml is one sentence and exit code 1.

    pyinfra would put the file and line of our own code before it.
    """
    try:
        return hosts()
    except QuietportError as error:
        sys.exit(f"quietport: {error}")


def hosts() -> list[tuple[str, dict[str, Any]]]:
    """Every host as `@quietport/NAME` with plain data, under one key so that it is nobody's argument.

    Deploys take `control.settings.settings_for(host.name)`; the data is for eyes. Raises SettingsError.
    """
    return [
        (f"@quietport/{name}", {"quietport": settings.to_json()}) for name, settings in fleet().hosts.items()
    ]
