"""A host for the doctor's checks: a tree of files, a clock, and programs that answer what a test says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quietport.commands import Done
from quietport.doctor.model import Finding
from quietport.doctor.place import Place

NOW = 1_800_000_000.0
DECLARED = {"schema": 1, "name": "vps1"}
UNIT = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "NeedDaemonReload": "no",
    "Result": "success",
    "ExecMainStatus": "0",
    "Transient": "no",
}


@dataclass
class World:
    """The host below `root`. `units` says what differs from a unit that is well."""

    root: Path
    units: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, Done] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    @property
    def place(self) -> Place:
        return Place(root=self.root, run=self.run, wall=lambda: NOW)

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done:
        self.asked.append(list(argv))
        assert stdin == ""
        if list(argv[:2]) == ["systemctl", "show"]:
            return Done(0, self._show(argv), "")
        return self.answers[argv[0] if argv[0] in self.answers else " ".join(argv[:2])]

    def _show(self, argv: Sequence[str]) -> str:
        wanted = argv[2].removeprefix("--property=").split(",")
        blocks = []
        for name in argv[argv.index("--") + 1 :]:
            shown: Mapping[str, str] = {"Id": name, **UNIT, **self.units.get(name, {})}
            blocks.append("".join(f"{key}={shown[key]}\n" for key in wanted))
        return "\n".join(blocks)

    def write(self, path: str, text: str = "", *, mode: int = 0o644) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    def process(self, name: str, pid: int = 7) -> None:
        """A process of this host."""
        self.write(f"/proc/{pid}/comm", f"{name}\n")
        self.write(f"/proc/{pid}/status", f"Name:\t{name}\nNSpid:\t{pid}\n")


def statuses(found: Sequence[Finding]) -> list[str]:
    return [one.status for one in found]


def commands(finding: Finding) -> list[str]:
    """What its next step says to type."""
    return re.findall(r"`([^`]+)`", finding.next_step)


def only(found: Sequence[Finding], status: str) -> Finding:
    """The one finding, with that status; one that is not well says what to do."""
    assert statuses(found) == [status], found
    assert found[0].reason.strip().endswith((".", "?")), found
    assert "\n" not in found[0].reason
    if status in ("WARN", "FAIL"):
        assert commands(found[0]), found
    return found[0]
