"""What a host is, as one JSON document: run on the host itself with `python3 -I`, standard library only.

Standard input: {"replace": [[TEXT, WORD], ...]}: what is by chance on this host (addresses, names).
Standard output: {"facts": {AREA: {NAME: TEXT}}, "due": [SENTENCE, ...]}: everything that two hosts which were
told the same must have in common, and what still waits for a restart or a reload.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Each file with its content, mode and owner.
CONTENTS = ("/etc", "/root", "/home", "/usr/local", "/var/lib/quietport", "/var/log/quietport")
# What timers leave, which run at a time of their own: the doctor, the report, the prune of agent access.
OF_TIMERS = (
    r"|/var/lib/quietport/(doctor(/|$)|ports\.json$)"
    r"|/home/[^/]+/\.local/state/codex-openclaw-ssh-agent/staging$"
)
# What differs between two runs on one host without any kill: made at random, with a time in it, or not ours.
BY_CHANCE = re.compile(
    r"/etc/(machine-id|hostname|hosts|resolv\.conf(\.before-tailscale)?|ld\.so\.cache|mtab|\.pwd\.lock)$"
    # Copies that the last change of an account left.
    r"|/etc/(passwd|group|shadow|gshadow|subuid|subgid)-$"
    r"|/etc/docker/key\.json$"
    r"|/root/\.(cache|docker)(/|$)"
    # One of each guard, confirmed or not.
    r"|/var/lib/quietport/guard/history/" + OF_TIMERS
)
# A path that is there on one host and not on the other is a difference, but for these.
PATHS_BY_CHANCE = re.compile(
    r"/(proc|sys|dev)(/|$)"
    r"|/var/(cache|log)/"
    r"|/var/lib/(apt|dpkg|docker|containerd|tailscale|systemd|private|ucf|logrotate|ufw|AccountsService)/"
    r"|/run/(?!quietport)"
    # What dpkg's and apt's timers copy at midnight.
    r"|/var/backups/"
    r"|/var/lib/quietport/guard/history/"
    r"|/(usr/share|usr/lib|usr/include|usr/src)/"
    r"|/root/\.(cache|docker)(/|$)"
    r"|(/var)?/tmp/systemd-private-" + OF_TIMERS
)
PREFERENCES_BY_CHANCE = ("Config", "Persist", "AutoUpdate", "AppConnector")
MAX_TEXT = 4096
# It comes at midnight, and fails where a story has published something.
REPORT = "quietport-report.service"
# Programs whose port is another every time.
EPHEMERAL = ("containerd",)
WIREGUARD = "41641"
# Where the lab's Docker answers a container target's questions for names.
LAB_RESOLVER = "127.0.0.11"
CONFIGURATION = {
    "ssh.service": ("/etc/ssh/sshd_config", "/etc/ssh/sshd_config.d", "/etc/default/ssh"),
    "docker.service": ("/etc/docker/daemon.json", "/etc/default/docker"),
    "tailscaled.service": ("/etc/default/tailscaled", "/usr/sbin/tailscaled"),
}

Text = Callable[[str], str]


def output(*argv: str) -> str:
    """What a program prints; a mark in its place when it is not there."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except FileNotFoundError:
        return "(not installed)"
    failed = f"(exit code {done.returncode}) {done.stderr}" if done.returncode else ""
    return failed + done.stdout


def replacer(pairs: Iterable[Iterable[str]]) -> Text:
    """A function that writes the word for each text where it stands by itself.

    Of another address, as constants of a program have them, it may be the beginning.
    """
    words = {text: word for text, word in pairs if text}
    if not words:
        return str
    texts = "|".join(re.escape(text) for text in sorted(words, key=len, reverse=True))
    pattern = re.compile(f"(?<![0-9A-Za-z])(?:{texts})(?![0-9A-Za-z])")
    return lambda value: pattern.sub(lambda found: words[found[0]], value)


def walk(roots: Iterable[str]) -> Iterator[Path]:
    """Every path below the roots, on their own file system."""
    for root in roots:
        if not os.path.lexists(root):
            continue
        device = os.lstat(root).st_dev
        for folder, names, files in os.walk(root):
            for name in [*names, *files]:
                yield Path(folder) / name
            names[:] = [name for name in names if _same_device(f"{folder}/{name}", device)]


def _same_device(path: str, device: int) -> bool:
    try:
        return os.lstat(path).st_dev == device
    except OSError:
        return False


def contents(roots: Iterable[str], plain: Text) -> dict[str, str]:
    """{path: "mode owner:group, and the text or its digest"} of every file, link and directory."""
    found = {}
    for path in walk(roots):
        if BY_CHANCE.search(str(path)):
            continue
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        head = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
        found[plain(str(path))] = f"{head} {_content(path, status, plain)}".rstrip()
    return found


def _content(path: Path, status: os.stat_result, plain: Text) -> str:
    if stat.S_ISLNK(status.st_mode):
        return f"-> {plain(str(path.readlink()))}"
    if not stat.S_ISREG(status.st_mode):
        return ""
    data = path.read_bytes()
    if path.name in ("shadow", "gshadow"):
        # The day of the last change of a password.
        data = re.sub(rb"^(.*?:.*?):\d+:", rb"\1:DAY:", data, flags=re.MULTILINE)
    text = plain(data.decode(errors="replace"))
    # Only what everybody may read is told as text: a difference can then be read in the report.
    if status.st_mode & stat.S_IROTH and len(text) < MAX_TEXT and "\x00" not in text:
        return text
    return hashlib.sha256(text.encode()).hexdigest()


def paths(plain: Text) -> dict[str, str]:
    """Every path there is, but for those where something comes and goes by itself."""
    roots = ("/", "/run", "/tmp", "/dev/shm")
    found = (str(path) for path in walk(roots))
    return {plain(path): "is there" for path in found if not PATHS_BY_CHANCE.match(path)}


def lines(text: str, plain: Text) -> dict[str, str]:
    """Lines whose order means nothing: the first word is the name."""
    pairs = (plain(line).strip().partition(" ") for line in text.splitlines() if line.strip())
    return {name: rest.strip() for name, _, rest in pairs}


def listeners(plain: Text) -> dict[str, str]:
    """{"tcp 100.64.0.1:22": process}; sockets of the day of programs that have such have no number."""
    found = {}
    for line in output("ss", "-Hlntup").splitlines():
        words = line.split()
        name = (re.findall(r'\(\("([^"]+)"', line) or ["?"])[0]
        address, _, port = plain(words[4]).rpartition(":")
        # tailscaled's peer API begins to listen anew, on each family by itself, whenever the network changes.
        if address == LAB_RESOLVER or (name == "tailscaled" and port != WIREGUARD):
            continue
        if name in EPHEMERAL:
            port = "*"
        found[f"{words[0]} {address}:{port}"] = name
    return found


def chains(plain: Text) -> dict[str, str]:
    """{"iptables filter INPUT": its rules}: ours and ufw's in order, then those of other daemons."""
    found: dict[str, str] = {}
    for program in ("iptables", "ip6tables"):
        found |= {
            f"{program} {name}": text for name, text in saved_rules(plain(output(f"{program}-save"))).items()
        }
    return found


def saved_rules(saved: str) -> dict[str, str]:
    """{"filter INPUT": rules} from what `iptables-save` prints.

    Docker and tailscaled put their rules first whenever they start: which of them is before the other is by
    chance. (Whether the chain that shields containers comes first is for `quietport docker-user --check`.)
    """
    ordered: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            ordered[f"{table} {chain}"] = [f"policy {policy}"]
            others[f"{table} {chain}"] = []
        elif line.startswith("-A ") and LAB_RESOLVER not in line:
            theirs = table == "nat" or re.search(r" -j (ts-|DOCKER)|docker0|br-", line)
            name = f"{table} {line.split()[1]}"
            (others if theirs else ordered)[name].append(line)
    return {name: "\n".join([*rules, *sorted(others[name])]) for name, rules in ordered.items()}


def units(plain: Text) -> dict[str, str]:
    """State of every unit file, and of every service, socket and timer that is loaded and lasts."""
    found = {}
    listed = output("systemctl", "list-unit-files", "--all", "--plain", "--no-legend", "--no-pager")
    for line in listed.splitlines():
        name, state = line.split()[:2]
        # Of a login or a job: numbered as they come.
        if not name.startswith(("session-", "run-")):
            found[f"{name} is"] = state
    kinds = "--type=service,socket,timer"
    active = output("systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", kinds)
    for line in active.splitlines():
        name, load, state, sub = line.split()[:4]
        if name.startswith(
            ("apt-daily", "session-", "user@", "user-runtime-dir@", "run-", "systemd-", "ldconfig")
        ):
            continue
        if name.startswith(("dpkg-db-backup", "e2scrub", "fstrim", "logrotate", "man-db", REPORT)):
            continue
        found[f"{name} runs"] = f"{load} {state} {sub}"
    return {plain(name): text for name, text in found.items()}


def failed_units() -> str:
    """Units that failed, but for those that watch paths: this machine's limits may be exhausted by others."""
    listed = output("systemctl", "--failed", "--plain", "--no-legend").splitlines()
    names = [line.split()[0] for line in listed]
    return " ".join(name for name in names if name != REPORT and not name.endswith(".path"))


def packages() -> dict[str, str]:
    """Version and state of every package, which were asked for by name, and what dpkg complains of."""
    form = "${Package}:${Architecture} ${Version} ${db:Status-Abbrev}\n"
    found = lines(output("dpkg-query", "-W", "-f", form), str)
    found["asked for"] = " ".join(sorted(output("apt-mark", "showmanual").split()))
    found["dpkg --audit"] = output("dpkg", "--audit")
    journal = [path.name for path in Path("/var/lib/dpkg/updates").iterdir()]
    found["half done"] = " ".join(sorted(name for name in journal if name.isdigit()))
    return found


def tailscale(plain: Text) -> dict[str, str]:
    """State and preferences of the host's node."""
    try:
        status = json.loads(output("tailscale", "status", "--json", "--peers=false"))
        preferences = json.loads(output("tailscale", "debug", "prefs"))
    except ValueError:
        return {"state": "it does not answer"}
    node = status.get("Self") or {}
    own = {key: node.get(key) for key in ("HostName", "DNSName", "KeyExpiry", "Expired", "Tags")}
    kept = {key: value for key, value in preferences.items() if key not in PREFERENCES_BY_CHANCE}
    found = {"BackendState": status.get("BackendState"), **own, **kept}
    return {name: plain(json.dumps(value, sort_keys=True)) for name, value in found.items()}


def sshd(plain: Text) -> dict[str, str]:
    """What sshd makes of a login from the tailnet and from a public address."""
    found = {}
    for source in ("100.100.200.200", "203.0.113.9"):
        said = output("/usr/sbin/sshd", "-T", "-C", f"user=root,host={source},addr={source}")
        found[f"for {source}"] = plain("\n".join(sorted(said.splitlines())))
    return found


def properties(unit: str) -> dict[str, str]:
    """What systemd says of a unit, times in UTC."""
    names = "MainPID,ExecMainStartTimestamp,FragmentPath,DropInPaths,NeedDaemonReload"
    shown = output("systemctl", "show", unit, "--timestamp=us+utc", f"--property={names}")
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def due() -> list[str]:
    """Restarts and reloads that wait: a process older than its configuration, units systemd has not read."""
    found = []
    for unit, configuration in CONFIGURATION.items():
        shown = properties(unit)
        if shown.get("MainPID", "0") == "0":
            continue
        started = _seconds(shown["ExecMainStartTimestamp"])
        names = [*configuration, shown["FragmentPath"], *shown["DropInPaths"].split()]
        there = [Path(name) for name in names if name and Path(name).exists()]
        there += [path for folder in there if folder.is_dir() for path in folder.iterdir()]
        found += [f"{unit} is older than {path}" for path in there if path.stat().st_mtime > started]
    all_units = output("systemctl", "show", "*", "--property=Id,NeedDaemonReload")
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in all_units.split("\n\n")]
    waiting = [block["Id"] for block in blocks if block.get("NeedDaemonReload") == "yes"]
    found += [f"{unit} waits for a daemon-reload" for unit in waiting]
    return sorted(set(found))


def _seconds(text: str) -> float:
    moment = datetime.strptime(text.strip(), "%a %Y-%m-%d %H:%M:%S.%f UTC")
    return moment.replace(tzinfo=UTC).timestamp()


def state(plain: Text) -> dict[str, Any]:
    """All of it."""
    docker = "{{.LiveRestoreEnabled}} {{.Containers}} {{.ServerVersion}}"
    return {
        "facts": {
            "file": contents(CONTENTS, plain),
            "path": paths(plain),
            "unit": units(plain),
            "listener": listeners(plain),
            "rules": chains(plain),
            "ufw": {
                "status": output("ufw", "status", "verbose"),
                "added": output("ufw", "show", "added"),
            },
            "sshd": sshd(plain),
            "package": packages(),
            "tailscale": tailscale(plain),
            "docker": {
                "engine": output("docker", "info", "--format", docker),
                "shield": output("/usr/local/sbin/quietport", "docker-user", "--check"),
            },
            "systemd": {"failed": failed_units()},
        },
        "due": due(),
    }


if __name__ == "__main__":
    json.dump(state(replacer(json.load(sys.stdin)["replace"])), sys.stdout)
