"""What a process is: its unit and its executable, as the kernel tells them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")


@dataclass(frozen=True)
class Program:
    """Unit ("" when it has none) and executable path ("" when it cannot be read) of a process."""

    unit: str = ""
    executable: str = ""


def cgroup_path(text: str) -> str:
    """The path that systemd manages, from the text of /proc/PID/cgroup; "" when there is none.

    On hybrid hosts the unified line says "/" and the one named systemd has the path.
    """
    unified = named = ""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            unified = path
        elif controllers == "name=systemd":
            named = path
    return unified if unified not in ("", "/") else named or unified


def unit_of(cgroup: str, init_cgroup: str) -> str:
    """The unit in which a process runs, from its and PID 1's /proc/PID/cgroup; "" when it is in none.

    As systemd does it (src/basic/cgroup-util.c, cg_shift_path and cg_path_get_unit): the part that PID 1
    itself is in is cut off, then slices are skipped, and the next component is the unit. Processes of a
    container are thus in the container's scope, whatever units they claim inside.
    """
    root = cgroup_path(init_cgroup).removesuffix("/init.scope").rstrip("/")
    path = cgroup_path(cgroup)
    if path != root and not path.startswith(f"{root}/"):
        return ""
    for part in path[len(root) :].strip("/").split("/"):
        if part.endswith(".slice"):
            continue
        # systemd puts "_" before names that would clash with files of the cgroup file system.
        name = part.removeprefix("_")
        return name if name.endswith(_UNIT_SUFFIXES) else ""
    return ""


def program_of(pid: int, *, proc: Path = Path("/proc")) -> Program:
    """Unit and executable of the process `pid`; empty where /proc does not tell (gone, or not root)."""
    try:
        unit = unit_of((proc / str(pid) / "cgroup").read_text(), (proc / "1" / "cgroup").read_text())
    except (OSError, UnicodeDecodeError):
        unit = ""
    try:
        executable = str((proc / str(pid) / "exe").readlink())
    except OSError:
        executable = ""
    return Program(unit=unit, executable=executable)


def is_running(name: str, *, proc: Path = Path("/proc")) -> bool:
    """Whether any process of this host calls itself `name` (15 bytes of it), those in containers left out.

    Anyone can: the answer may only make a caller more careful. A container's processes have one more number
    in NSpid (proc_pid_status(5)); its Docker is not the host's.
    """
    wanted = name.encode()[:15]
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                if (folder / "comm").read_bytes().rstrip(b"\n") != wanted:
                    continue
                status = (folder / "status").read_bytes()
            except OSError:
                continue
            spaces = next((line for line in status.split(b"\n") if line.startswith(b"NSpid:")), b"")
            if len(spaces.split()) <= 2:
                return True
    return False


def shell_is_running(name: str) -> str:
    """A shell command that succeeds when `is_running(name)` is true on the host it runs on."""
    program = f'/^Name:/ {{ name = $2 }} /^NSpid:/ && NF == 2 && name == "{name[:15]}" {{ found = 1 }}'
    return f"cat /proc/[0-9]*/status 2>/dev/null | awk '{program} END {{ exit !found }}'"


# Read by `parse_socket_units`.
SHOW_SOCKET_UNITS = ("systemctl", "show", "-p", "Id", "-p", "ActiveState", "-p", "Listen", "*.socket")
_LISTEN = re.compile(
    r"Listen=(?:vsock:(?P<cid>\d*)|\[(?P<six>[^]]+)\]|(?P<four>[\d.]+)):(?P<port>\d+) \((?P<kind>\w+)\)"
)
_EVERY_CID = ("", "4294967295")


def parse_socket_units(text: str) -> dict[tuple[str, str, int], str]:
    """(protocol, address, port) = socket unit, of the active ones in what SHOW_SOCKET_UNITS prints.

    Addresses are written as ss does; "*" is every CID of vsock. What is not understood is left out: the unit
    of such a socket is then PID 1's.
    """
    found: dict[tuple[str, str, int], str] = {}
    for block in text.split("\n\n"):
        lines = block.split("\n")
        unit = next((line[3:] for line in lines if line.startswith("Id=")), "")
        if "ActiveState=active" not in lines:
            continue
        for listen in filter(None, map(_LISTEN.fullmatch, lines)):
            protocol = {"Stream": "tcp", "Datagram": "udp"}.get(listen["kind"], "")
            address = listen["six"] or listen["four"] or ""
            if listen["cid"] is not None:
                protocol, address = "vsock", "*" if listen["cid"] in _EVERY_CID else listen["cid"]
            found[protocol, address, int(listen["port"])] = unit
    return found
