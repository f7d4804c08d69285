"""What sshd reads, which of its lines stand in our way, and the drop-in that closes the public side.

Pure functions: text in, text out. The operator's side plans with them, `quietport sshd-apply` checks with
them on the host. Sources: sshd_config(5), servconf.c of OpenSSH 9.2 and 10.0, and what was run against both.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from quietport.net import TAILNET_RANGES

MAIN = "/etc/ssh/sshd_config"
FOLDER = "/etc/ssh/sshd_config.d"
# 00: of most keywords the first value wins, and a folder is read in the order of the names.
DROP_IN = f"{FOLDER}/00-quietport.conf"
UNIT = "ssh.service"
UNIT_DROP_IN = "/etc/systemd/system/ssh.service.d/10-quietport.conf"
PORT = 22

# The first words of the drop-in.
OURS = "# Written by quietport"
WAS = "# quietport: was: "
ADDED = "# quietport: added: "
_INCLUDE_OURS = f"Include {DROP_IN}"

# Every line of these counts, wherever it stands: a later `ListenAddress 0.0.0.0` stays active beside ours.
ACCUMULATING = frozenset({"listenaddress", "port"})
# Of these the first line wins, so a line competes only where it is read before ours.
FIRST_WINS = frozenset(
    {
        "addressfamily",
        "authenticationmethods",
        "kbdinteractiveauthentication",
        "passwordauthentication",
        "permitrootlogin",
        "persourcepenaltyexemptlist",
        "pubkeyauthentication",
        "usepam",
    }
)
_ALIASES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "skeyauthentication": "kbdinteractiveauthentication",
}

# Nobody's addresses, one of the tailnet's range and one of the documentation's (RFC 5737): Match blocks may
# treat them differently.
ASKED_FROM = ("100.100.200.200", "203.0.113.9")

# Socket units that put sshd, or a shell by way of it, where sshd_config has no say. The sshd-* ones are what
# systemd-ssh-generator makes (systemd 256 and newer); a link in /etc wins over a generated unit.
SERVICE_SOCKETS = ("ssh.socket", "sshd.socket")  # these hold the service's own port
SOCKETS = (
    *SERVICE_SOCKETS,
    "ssh@.socket",
    "sshd@.socket",
    "sshd-vsock.socket",
    "sshd-unix-local.socket",
    "sshd-unix-export.socket",
)
# `systemctl enable ssh.socket` leaves this, and ssh.service cannot start beside a masked unit it requires.
SOCKET_LINKS = (
    "/etc/systemd/system/ssh.service.requires/ssh.socket",
    "/etc/systemd/system/sshd.service.requires/ssh.socket",
)

Listener = tuple[str, int]


@dataclass(frozen=True)
class Line:
    """One line with a keyword. `scope` is "" or the arguments of the Match block it stands in."""

    path: str
    index: int
    keyword: str
    args: tuple[str, ...]
    scope: str


_WORDS = re.compile(r'^[ \t\r\f]*(?:"([A-Za-z0-9]+)"|([A-Za-z0-9]+))(?:[ \t]*=[ \t]*|[ \t]+|$)(.*)$')


def parse_line(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Keyword (lower case, of aliases the name in use) and arguments of a line. None: blank or a comment."""
    match = _WORDS.match(text.rstrip())
    if match is None:
        return None
    keyword = (match[1] or match[2]).lower()
    try:
        args = tuple(shlex.split(match[3], comments=True))
    except ValueError:
        args = tuple(match[3].split())
    return _ALIASES.get(keyword, keyword), args


def parse(path: str, text: str, *, scope: str = "") -> list[Line]:
    """The lines of one file with a keyword, Match lines included. A Match block ends with its file."""
    lines = []
    for index, raw in enumerate(text.split("\n")):
        parsed = parse_line(raw)
        if parsed is None:
            continue
        keyword, args = parsed
        if keyword == "match":
            scope = " ".join(args)
        lines.append(Line(path=path, index=index, keyword=keyword, args=args, scope=scope))
    return lines


def included(pattern: str, paths: Iterable[str]) -> list[str]:
    """Which of `paths` an Include argument names, in the order sshd reads them (glob(3), sorted)."""
    full = PurePosixPath("/etc/ssh") / pattern
    return sorted(
        path
        for path in paths
        if str(PurePosixPath(path).parent) == str(full.parent)
        and fnmatch.fnmatchcase(PurePosixPath(path).name, full.name)
        and (full.name.startswith(".") or not PurePosixPath(path).name.startswith("."))
    )


def reading_order(files: Mapping[str, str]) -> Iterator[Line]:
    """Every line in the order sshd reads them from the main file, with Include followed into `files`.

    What is read a second time in the same kind of scope adds nothing, and is left out; so is a file that
    includes itself, which sshd refuses anyway.
    """
    yield from _read(MAIN, files, scope="", seen=set())


def _read(path: str, files: Mapping[str, str], *, scope: str, seen: set[tuple[str, bool]]) -> Iterator[Line]:
    if (path, bool(scope)) in seen:
        return
    seen.add((path, bool(scope)))
    for line in parse(path, files.get(path, ""), scope=scope):
        yield line
        if line.keyword == "include":
            for pattern in line.args:
                for name in included(pattern, files):
                    yield from _read(name, files, scope=line.scope, seen=seen)


def allows_password(line: Line) -> bool:
    """Whether this line, where its Match block holds, lets somebody in without a key."""
    if line.keyword in ("passwordauthentication", "kbdinteractiveauthentication"):
        return [arg.lower() for arg in line.args] != ["no"]
    if line.keyword == "authenticationmethods":
        methods = {method for arg in line.args for method in arg.lower().split(",")}
        return methods != {"publickey"}
    return False


def competing(files: Mapping[str, str]) -> list[Line]:
    """The lines that would win against the drop-in, or stay active beside it.

    `files` holds the drop-in as it will be and a main file that reads it.
    """
    found: dict[tuple[str, int], Line] = {}
    ours_read = False
    for line in reading_order(files):
        if line.path == DROP_IN:
            ours_read = True
            continue
        loses = ours_read and line.keyword in FIRST_WINS
        if (
            line.keyword in ACCUMULATING
            or (not line.scope and line.keyword in FIRST_WINS and not loses)
            or (line.scope and allows_password(line))
        ):
            found[line.path, line.index] = line
    return list(found.values())


def neutralise(text: str, indexes: Iterable[int]) -> str:
    """`text` with the lines at `indexes` (from 0) turned into comments that keep what they were."""
    lines = text.split("\n")
    for index in set(indexes):
        lines[index] = WAS + lines[index]
    return "\n".join(lines)


def restore(text: str) -> str:
    """`text` as it was before `neutralise` and `with_include`."""
    kept = []
    skip = False
    for line in text.split("\n"):
        if skip and line == _INCLUDE_OURS:
            skip = False
            continue
        skip = line.startswith(ADDED)
        if not skip:
            kept.append(line.removeprefix(WAS))
    return "\n".join(kept)


def reads_drop_in(files: Mapping[str, str]) -> bool:
    """Whether the main file includes the drop-in, and outside every Match block."""
    return any(
        line.keyword == "include"
        and not line.scope
        and any(DROP_IN in included(pattern, [DROP_IN]) for pattern in line.args)
        for line in parse(MAIN, files.get(MAIN, ""))
    )


def with_include(text: str) -> str:
    """The main file with our Include as its first line.

    It names our drop-in alone: files in the folder that nobody reads today stay unread.
    """
    return f"{ADDED}the next line, because nothing read {FOLDER}\n{_INCLUDE_OURS}\n{text}"


def wanted_files(files: Mapping[str, str], drop_in: str) -> dict[str, str]:
    """What the files of sshd must hold, as path = text: those of `files`, and our drop-in."""
    wanted = {**files, DROP_IN: drop_in}
    if not reads_drop_in(wanted):
        wanted[MAIN] = with_include(wanted.get(MAIN, ""))
    indexes: dict[str, list[int]] = {}
    for line in competing(wanted):
        indexes.setdefault(line.path, []).append(line.index)
    for path, lines in indexes.items():
        wanted[path] = neutralise(wanted[path], lines)
    return wanted


def neutralised(files: Mapping[str, str], wanted: Mapping[str, str]) -> list[tuple[str, str]]:
    """(path, line) of what `wanted` comments out that is active in `files`, in the files' order."""
    found = []
    for path, text in wanted.items():
        before = files.get(path, "").split("\n")
        for line in text.split("\n"):
            if not line.startswith(WAS):
                continue
            if line in before:
                before.remove(line)
            else:
                found.append((path, line.removeprefix(WAS).strip()))
    return found


def foreign_root_login(files: Mapping[str, str]) -> str | None:
    """The PermitRootLogin that would hold without us: of what others wrote, the first."""
    without = {path: restore(text) for path, text in files.items() if path != DROP_IN}
    for line in reading_order(without):
        if line.keyword == "permitrootlogin" and not line.scope and line.args:
            return line.args[0].lower()
    return None


def root_login(files: Mapping[str, str], *, login_user: str) -> str:
    """The PermitRootLogin to write: root by key, but never looser than what stands there already."""
    foreign = foreign_root_login(files)
    if login_user != "root" and foreign in ("no", "forced-commands-only"):
        return foreign
    return "prohibit-password"


def wanted_listeners(addresses: Iterable[str]) -> list[Listener]:
    """Where sshd listens: the tailnet's addresses, or loopback while there is none."""
    # No ListenAddress at all means 0.0.0.0 and [::], and `sshd -t` is content with it.
    known = {ipaddress.ip_address(address) for address in addresses}
    if any(address.is_unspecified for address in known):
        raise ValueError("0.0.0.0 and :: are every address, not one of the tailnet")
    ordered = sorted(known, key=lambda address: (address.version, int(address)))
    return [(str(address), PORT) for address in ordered] or [("127.0.0.1", PORT)]


def public_listeners(*, ipv6: bool = True) -> list[Listener]:
    """Where sshd listens when the firewall alone decides who reaches it (break-glass).

    The tailnet's addresses beside them would be EADDRINUSE.
    """
    return [("0.0.0.0", PORT), *([("::", PORT)] if ipv6 else [])]  # noqa: S104


def is_wildcard(address: str) -> bool:
    """Whether an address stands for all of them."""
    return ipaddress.ip_address(address).is_unspecified


def endpoint(listener: Listener) -> str:
    """`1.2.3.4:22` or `[fd7a::1]:22`, as sshd_config and `sshd -T` write it."""
    address, port = listener
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def render(
    addresses: Iterable[str],
    *,
    permit_root_login: str = "prohibit-password",
    penalties: bool = False,
    public: Iterable[Listener] = (),
) -> str:
    """The drop-in for a host with these tailnet addresses, or with the listeners `public` in their place.

    `penalties`: this sshd knows PerSourcePenalties (OpenSSH 9.8 and newer), which blocks a source after a few
    failed logins; the tailnet is exempt, or one bad key locks the operator out for minutes.
    """
    listen = "\n".join(_listen_lines(public) or _listen_lines(wanted_listeners(addresses)))
    exempt = f"PerSourcePenaltyExemptList {','.join(map(str, TAILNET_RANGES))}\n" if penalties else ""
    return (
        f"{OURS}; `quietport` replaces it. sshd takes keys alone, and answers where these lines say.\n"
        "AddressFamily any\n"
        f"Port {PORT}\n"
        f"{listen}\n"
        "PubkeyAuthentication yes\n"
        "PasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\n"
        "AuthenticationMethods publickey\n"
        f"PermitRootLogin {permit_root_login}\n"
        "UsePAM yes\n"
        f"{exempt}"
    )


def _listen_lines(listeners: Iterable[Listener]) -> list[str]:
    return [f"ListenAddress {endpoint(listener)}" for listener in listeners]


def listen_addresses(text: str) -> list[str]:
    """The addresses in the ListenAddress lines of a file, without their ports, as sshd takes them.

    Raises ValueError for a line that holds no address: a name, or one of the short forms of 0.0.0.0.
    """
    found = []
    for line in parse(DROP_IN, text):
        if line.keyword == "listenaddress":
            host, _ = _host_and_port(line.args[0] if line.args else "")
            found.append(str(ipaddress.ip_address(host)))
    return found


def with_addresses(text: str, addresses: Iterable[str]) -> str:
    """The drop-in `text` with the ListenAddress lines that `render` writes for `addresses`, the rest as is.

    Never without such a line, which would mean every address. For a text of `render` it is what `render`
    makes of the other addresses, byte for byte.
    """
    return _with_lines(text, wanted_listeners(addresses))


def with_public(text: str, public: Iterable[Listener]) -> str:
    """The drop-in `text` with the listeners `public` in place of its ListenAddress lines, the rest as is."""
    return _with_lines(text, public)


def _with_lines(text: str, listeners: Iterable[Listener]) -> str:
    lines = text.split("\n")
    parsed = parse(DROP_IN, text)
    old = {line.index for line in parsed if line.keyword == "listenaddress"}
    # Where the first one stood; else behind our Port line, or the first line of all.
    ports = [line.index for line in parsed if line.keyword == "port" and not line.scope]
    at = min(old, default=(ports[0] if ports else 0) + 1)
    before = [line for index, line in enumerate(lines[:at]) if index not in old]
    after = [line for index, line in enumerate(lines[at:], start=at) if index not in old]
    return "\n".join([*before, *_listen_lines(listeners), *after])


def parse_effective(text: str) -> dict[str, list[str]]:
    """`sshd -T` output as keyword = its values, in order."""
    effective: dict[str, list[str]] = {}
    for line in text.splitlines():
        keyword, _, value = line.strip().partition(" ")
        if keyword:
            effective.setdefault(keyword.lower(), []).append(value)
    return effective


_KEYS_AT_MOST = {
    "passwordauthentication": "no",
    "kbdinteractiveauthentication": "no",
    "authenticationmethods": "publickey",
}
_KEYS_ONLY = {**_KEYS_AT_MOST, "pubkeyauthentication": "yes"}


def in_without_key(effective: Mapping[str, list[str]]) -> list[str]:
    """What in `sshd -T -C` output lets somebody in without a key. Empty: a key, or nobody."""
    return _otherwise(effective, _KEYS_AT_MOST)


def not_keys_only(effective: Mapping[str, list[str]]) -> list[str]:
    """What in `sshd -T -C` output lets somebody in without a key, or keeps keys out. Empty: keys only."""
    return _otherwise(effective, _KEYS_ONLY)


def _otherwise(effective: Mapping[str, list[str]], wanted: Mapping[str, str]) -> list[str]:
    return [
        f"{keyword} is {' '.join(effective.get(keyword, [])) or 'not set'}, not {value}"
        for keyword, value in wanted.items()
        if [found.lower() for found in effective.get(keyword, [])] != [value]
    ]


def effective_listeners(effective: Mapping[str, list[str]]) -> set[str]:
    """Where `sshd -T` says it will listen, as `endpoint` writes it."""
    return set(effective.get("listenaddress", []))


def redirect_includes(text: str, folder: str) -> str:
    """`text` with Include lines that name /etc/ssh/sshd_config.d pointed at `folder` instead.

    So that `sshd -t` can read a candidate before any of it is active.
    """
    lines = text.split("\n")
    for index, raw in enumerate(lines):
        parsed = parse_line(raw)
        if parsed is None or parsed[0] != "include":
            continue
        full = [PurePosixPath("/etc/ssh") / pattern for pattern in parsed[1]]
        moved = [f"{folder}/{path.name}" if str(path.parent) == FOLDER else str(path) for path in full]
        lines[index] = f"Include {' '.join(moved)}"
    return "\n".join(lines)


def without_ours(files: Mapping[str, str]) -> dict[str, str]:
    """The files as they were without us: our drop-in gone, marked lines back. A drop-in of others stays."""
    kept = {path: restore(text) for path, text in files.items() if path != DROP_IN}
    drop_in = files.get(DROP_IN)
    return kept if drop_in is None or drop_in.startswith(OURS) else {**kept, DROP_IN: drop_in}


def public_ports(files: Mapping[str, str]) -> list[int]:
    """The ports on which sshd with these files listens for more than loopback, as far as the files tell.

    A ListenAddress without a port takes every Port line; without any, all addresses do (sshd_config(5)).
    """
    lines = [line for line in reading_order(files) if line.args]
    ports = [int(line.args[0]) for line in lines if line.keyword == "port" and line.args[0].isdigit()] or [
        PORT
    ]
    listening = [line.args[0] for line in lines if line.keyword == "listenaddress"]
    found: list[int] = []
    for value in listening or ["0.0.0.0"]:  # noqa: S104
        host, port = _host_and_port(value)
        if host not in ("127.0.0.1", "::1", "localhost"):
            found += ports if port is None else [port]
    return sorted(set(found))


def _host_and_port(value: str) -> tuple[str, int | None]:
    bracketed = re.match(r"^\[([^\]]*)\](?::(\d+))?$", value)
    if bracketed:
        return bracketed[1], int(bracketed[2]) if bracketed[2] else None
    host, _, port = value.partition(":") if value.count(":") == 1 else (value, "", "")
    return host, int(port) if port.isdigit() else None


def parse_proc_net(text: str) -> dict[int, Listener]:
    """Listening TCP sockets of /proc/net/tcp or tcp6 as inode = (address, port).

    Format: Documentation/networking/proc_net_tcp.rst of the kernel; addresses are 32-bit words in the
    machine's byte order, which is little-endian on every machine this runs on.
    """
    found: dict[int, Listener] = {}
    for row in text.splitlines()[1:]:
        fields = row.split()
        if len(fields) < 10 or fields[3] != "0A":
            continue
        address, _, port = fields[1].partition(":")
        words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
        found[int(fields[9])] = (str(ipaddress.ip_address(b"".join(words))), int(port, 16))
    return found
