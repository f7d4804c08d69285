"""The hosts pyinfra is given: names, and what may be printed of their settings."""

from __future__ import annotations

from typing import Any

from control.settings import fleet


def hosts() -> list[tuple[str, dict[str, Any]]]:
    """Every host as `@quietport/NAME` with plain data, under one key so that it is nobody's argument.

    Deploys take `control.settings.settings_for(host.name)`; the data is for eyes. Raises SettingsError.
    """
    return [
        (f"@quietport/{name}", {"quietport": settings.to_json()}) for name, settings in fleet().hosts.items()
    ]
