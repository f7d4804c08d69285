"""secrets: files for root alone, from sources on the operator's side."""

from __future__ import annotations

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import secret
from operations.common import each


@deploy("secrets")
def secrets(settings: HostSettings) -> None:
    """One file a secret; what is in it never shows in a plan."""
    for path in each(sorted(settings.secrets)):
        secret.file(name=f"secrets: {path}", path=path, source=settings.secrets[path])
