"""The system: distribution, first-boot state, and what holds apt's locks."""

from __future__ import annotations

import json
import re
from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import Section, one_host_at_most, quoted, sections, split

APT_LOCKS = (
    "/var/lib/dpkg/lock-frontend",
    "/var/lib/dpkg/lock",
    "/var/lib/apt/lists/lock",
    "/var/cache/apt/archives/lock",
)
# fuser and lsof may be missing: the kernel's list gives inode and process, the process's open files confirm
# it (inodes repeat among file systems). "->" are those that wait for the lock.
_LOCKS = (
    f"for lock in {quoted(APT_LOCKS)}; do "
    'inode=$(stat -c %i "$lock") || continue; '
    'awk -v inode="$inode" \'$2 != "->" { n = split($6, place, ":"); if (place[n] == inode) print $5 }\' '
    "/proc/locks | sort -un | while read -r pid; do "
    'for fd in /proc/"$pid"/fd/*; do [ "$(readlink "$fd")" = "$lock" ] || continue; '
    'printf "%s %s %s\\n" "$lock" "$pid" "$(printf %s "$(cat /proc/"$pid"/comm)" | tr "\\n" "?")"; '
    "break; done; done; done; true"
)
# Only whole names made of digits count as an interrupted dpkg (apt's CheckUpdates).
_INTERRUPTED = (
    "ls -1 /var/lib/dpkg/updates | grep -E '^[0-9]+$'; "
    "grep -E '^Status: .* (half-installed|unpacked|half-configured|triggers-awaited|triggers-pending)$' "
    "/var/lib/dpkg/status; true"
)

_SECTIONS = (
    *("os", "arch", "systemd", "boot", "cloud", "result"),
    *("locks", "interrupted", "ipv6", "container", "python"),
)


class System(FactBase[dict[str, Any]]):
    """What the host is.

    {distribution, version, codename, arch (as dpkg says), systemd (0 when it is not PID 1), boot_id,
    cloud_init: absent|disabled|running|done, cloud_init_errors, apt_locks: [{path, pid, process}],
    dpkg_interrupted, ipv6, container, python ("3.11.2", None when missing)}.
    """

    @override
    def command(self) -> str:
        return sections(
            os="cat /etc/os-release",
            arch="dpkg --print-architecture",
            systemd="test -d /run/systemd/system && systemctl --version",
            boot="cat /proc/sys/kernel/random/boot_id",
            cloud="command -v cloud-init > /dev/null && echo installed; "
            "ls -1d /run/cloud-init/enabled /run/cloud-init/disabled /etc/cloud/cloud-init.disabled "
            "/run/cloud-init/result.json; true",
            result="test ! -e /run/cloud-init/result.json || cat /run/cloud-init/result.json",
            locks=_LOCKS,
            interrupted=_INTERRUPTED,
            ipv6="grep -q . /proc/net/if_inet6",
            container="systemd-detect-virt --container",
            python="python3 -I -c 'import sys; print(sys.version.split()[0])'",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return {
            "distribution": "",
            "version": "",
            "codename": "",
            "arch": "",
            "systemd": 0,
            "boot_id": "",
            "cloud_init": "absent",
            "cloud_init_errors": [],
            "apt_locks": [],
            "dpkg_interrupted": False,
            "ipv6": False,
            "container": False,
            "python": None,
        }

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, *_SECTIONS)
        assignments = re.findall(r"^([A-Z_]+)=(.*)$", parts["os"].text, re.MULTILINE)
        release = {name: value.strip("\"'") for name, value in assignments}
        systemd = re.match(r"systemd (\d+)", parts["systemd"].text)
        return {
            "distribution": release.get("ID", ""),
            "version": release.get("VERSION_ID", ""),
            "codename": release.get("VERSION_CODENAME", ""),
            "arch": parts["arch"].text.strip(),
            "systemd": int(systemd[1]) if systemd else 0,
            "boot_id": parts["boot"].text.strip(),
            "cloud_init": _cloud_init(parts["cloud"].text.split()),
            "cloud_init_errors": _cloud_init_errors(parts["result"].text),
            "apt_locks": _locks(parts["locks"]),
            "dpkg_interrupted": bool(parts["interrupted"].text.strip()),
            "ipv6": parts["ipv6"].code == 0,
            "container": parts["container"].code == 0,
            "python": parts["python"].text.strip() or None,
        }


def _cloud_init(found: list[str]) -> str:
    """cloud-init's state from the marks its generator leaves at boot (/run/cloud-init) and its result.

    An installed cloud-init without such marks has not been started by this boot and will not be.
    """
    if "installed" not in found:
        return "absent"
    if "/run/cloud-init/result.json" in found:
        return "done"
    if "/etc/cloud/cloud-init.disabled" in found or "/run/cloud-init/enabled" not in found:
        return "disabled"
    return "running"


def _cloud_init_errors(text: str) -> list[str]:
    try:
        errors = json.loads(text or "{}").get("v1", {}).get("errors", [])
    except (ValueError, AttributeError):
        return []
    return [str(error) for error in errors] if isinstance(errors, list) else []


def _locks(section: Section) -> list[dict[str, Any]]:
    found = []
    for line in section.text.splitlines():
        path, pid, process = line.split(" ", 2)
        found.append({"path": path, "pid": int(pid), "process": process})
    return found
