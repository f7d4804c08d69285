"""What a measurement was made on."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def state(*, load: float) -> dict[str, Any]:
    """date (UTC), cores (that this process may use), cpu (its name), load (as given, of one minute)."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[1] if model else "unknown",
        "load": round(load, 1),
    }
