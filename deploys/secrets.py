"""secrets: files for root alone, from sources on the operator's side."""

from __future__ import annotations

from pyinfra.api.deploy import deploy
from pyinfra.context import host

from control.settings import HostSettings
from operations import secret


@deploy("secrets")
def secrets(settings: HostSettings) -> None:
    """One file a secret; what is in it never shows in a plan."""
    # host.loop: a plain loop makes runs over several hosts fail with a cycle error.
    for path in host.loop(sorted(settings.secrets)):  # type: ignore[no-untyped-call]
        secret.file(name=f"secrets: {path}", path=path, source=settings.secrets[path])
