"""Guard: what a boot needs to undo a change that was not confirmed before it. See docs/guard.md."""

from __future__ import annotations

from pathlib import Path

from pyinfra.api.deploy import deploy

from control.settings import HostSettings
from operations import units
from quietport.unit_names import BOOT_UNIT

TEXT = (Path(__file__).parents[1] / "templates/guard" / BOOT_UNIT).read_text()


@deploy("guard")
def guard(settings: HostSettings) -> None:
    """The boot's unit, enabled; it runs only at a boot that finds a guard armed."""
    units.at_boot(name="guard: what is unconfirmed is undone at boot", unit=BOOT_UNIT, text=TEXT)
