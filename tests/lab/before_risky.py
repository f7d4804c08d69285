"""deploys/vps.py without its last transaction: what a host is before firewall and ssh (tests/lab/lockout.py).

The drop-in of ufw.service belongs to it: it is written before the guard is armed, and does nothing by itself.
"""

from __future__ import annotations

from pathlib import Path

from deploys.firewall import DROP_IN, DROP_IN_TEXT
from operations import units

VPS = Path(__file__).resolve().parents[2] / "deploys/vps.py"
before, risky, _ = VPS.read_text().partition("\nfirewall(settings=settings)\n")
if not risky:
    raise ValueError(f"{VPS} has no line for the firewall any more")
exec(compile(before, str(VPS), "exec"))  # noqa: S102
units.unit_files(name="firewall: its unit's drop-in", files={DROP_IN: DROP_IN_TEXT})
