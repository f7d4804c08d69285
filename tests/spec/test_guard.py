"""The guard: ready to undo at a boot, and nothing waits for its confirmation."""

from __future__ import annotations

from facts.guard import Guard
from facts.units import Units
from quietport.unit_names import BOOT_UNIT
from tests.spec.reading import Reading


def test_a_boot_would_undo_what_is_unconfirmed(reading: Reading) -> None:
    unit = reading.fact(Units, [BOOT_UNIT])[BOOT_UNIT]
    assert (unit["load"], unit["enabled"], unit["need_reload"]) == ("loaded", "enabled", False)
    # Before what it is about; nothing requires it, or sshd would not start when it fails.
    before = reading.text("systemctl show --value -p Before -- %s", BOOT_UNIT).split()
    assert {"ssh.service", "ufw.service"} <= set(before)
    assert reading.text("systemctl show --value -p RequiredBy -- %s", BOOT_UNIT).split() == []


def test_no_guard_is_left_armed(reading: Reading) -> None:
    assert reading.fact(Guard) == {"installed": True, "armed": None}
