"""A host of files and played commands, for the tests of the guard: what is on it changes as on a real one."""

from __future__ import annotations

import ipaddress
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quietport import sshd
from quietport.commands import Done
from quietport.guard import arming, state
from quietport.guard.machine import Machine

OLD_MAIN = "Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n"
TAILNET = "100.64.0.1"
PUBLIC = "198.51.100.7"
UFW_CONF = "/etc/ufw/ufw.conf"
USER_RULES = "/etc/ufw/user.rules"
SSH_RULE = "-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT"
WANTS = "/etc/systemd/system/multi-user.target.wants/ssh.service"


class Killed(BaseException):
    """The process is gone: nothing of its own code runs any more."""


class World:
    """What runs besides the files: units, sshd's sockets, chains, preferences. A Runner of the guard."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[list[str]] = []
        self.fails: dict[str, str] = {}
        self.dies_at: int | None = None
        self.hooks: dict[str, Callable[[], None]] = {}
        self.addresses = {"lo": ["127.0.0.1"], "eth0": [PUBLIC], "tailscale0": [TAILNET]}
        self.active = {"ssh.service", "ufw.service"}
        self.loaded: dict[str, tuple[str, str]] = {}
        self.timers: set[str] = set()
        self.boot_unit = "enabled"
        self.pid = 100
        self.changed_at = 1
        self.chains: dict[str, dict[str, list[str]]] = {"ipv4": {}, "ipv6": {}}
        self.policies = {
            family: dict.fromkeys(("INPUT", "FORWARD", "OUTPUT"), "ACCEPT") for family in self.chains
        }
        self.prefs: dict[str, Any] | None = {"RunSSH": False, "ShieldsUp": False, "Hostname": "vps1"}
        self.seconds = 1000.0
        self.bound: list[tuple[str, int]] = []
        self._files()
        self.reload()
        self.start_sshd()

    def _files(self) -> None:
        self.write("/proc/sys/kernel/random/boot_id", "boot-1\n")
        self.write("/proc/1/stat", stat(1, 0, ticks=3))
        (self.root / "run/systemd/system").mkdir(parents=True)
        (self.root / "var/lib").mkdir(parents=True)
        self.write(sshd.MAIN, OLD_MAIN)
        (self.root / sshd.FOLDER.lstrip("/")).mkdir()
        self.write("/usr/sbin/sshd", "")
        self.write(UFW_CONF, "ENABLED=no\n")
        self.write(USER_RULES, "*filter\nCOMMIT\n")
        self.write("/etc/default/ufw", 'IPV6=yes\nDEFAULT_INPUT_POLICY="DROP"\n')
        self.link(WANTS, "/lib/systemd/system/ssh.service")
        self.write("/opt/quietport.pyz", "the program")

    @property
    def machine(self) -> Machine:
        def sleep(seconds: float) -> None:
            self.seconds += seconds

        return Machine(root=self.root, run=self, now=lambda: self.seconds, sleep=sleep)

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def link(self, path: str, target: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).unlink(missing_ok=True)
        self.path(path).symlink_to(target)

    def arm(self, *, machine: Machine | None = None, **options: Any) -> Any:
        known = {
            "timeout": 120,
            "by": "a test",
            "confirm_over": "tailnet",
            "program": self.path("/opt/quietport.pyz"),
        }
        return arming.arm(machine or self.machine, **{**known, **options})

    def reboot(self) -> None:
        """What a boot changes; nothing is started."""
        self.write("/proc/sys/kernel/random/boot_id", "boot-2\n")
        self.seconds = 5.0
        self.timers.clear()
        self.active.clear()
        self.stop_sshd()

    # Commands.

    def __call__(self, argv: Sequence[str], *, stdin: str = "", timeout: float = 30) -> Done:
        if self.dies_at is not None and len(self.ran) >= self.dies_at:
            raise Killed
        words = list(argv)
        self.ran.append(words)
        line = " ".join(words)
        for prefix, hook in self.hooks.items():
            if line.startswith(prefix):
                hook()
        for prefix, complaint in self.fails.items():
            if line.startswith(prefix):
                return Done(1, "", complaint)
        return Done(0, self._answer(words, stdin), "")

    def _answer(self, words: list[str], stdin: str) -> str:
        program, rest = words[0], words[1:]
        if program == "systemctl":
            return self._systemctl([word for word in rest if word != "--no-block"])
        if program == "systemd-run":
            unit = next(word for word in rest if word.startswith("--unit=")).removeprefix("--unit=")
            self.timers.add(f"{unit}.timer")
            return ""
        if program == "ip":
            return json.dumps(
                [
                    {
                        "ifname": name,
                        "link_type": "loopback" if name == "lo" else "ether",
                        "addr_info": [{"local": address} for address in addresses],
                    }
                    for name, addresses in self.addresses.items()
                ]
            )
        if program.endswith("tables-save"):
            return self._save("ipv6" if program.startswith("ip6") else "ipv4")
        if program.endswith("tables-restore"):
            self._restore("ipv6" if program.startswith("ip6") else "ipv4", stdin)
        if program == "ufw":
            self._ufw(on=rest[-1] == "enable")
        if program == "tailscale":
            return self._tailscale(rest)
        return ""

    def _systemctl(self, words: list[str]) -> str:
        verb, names = words[0], [word for word in words[1:] if not word.startswith("--")]
        if verb == "show":
            if not names:
                return "UserspaceTimestampMonotonic=5000000\n"
            return "\n\n".join(self._shown(name) for name in names) + "\n"
        if verb == "is-enabled":
            return f"{self.boot_unit}\n"
        if verb == "daemon-reload":
            self.reload()
        for name in names:
            if verb == "stop":
                self.active.discard(name)
                self.timers.discard(name)
                if name == sshd.UNIT:
                    self.stop_sshd()
            elif verb in ("start", "restart"):
                self.active.add(name)
                if name == sshd.UNIT:
                    self.start_sshd()
        if verb in ("start", "stop") and any(name.endswith(".socket") for name in names):
            self._listen()
        return ""

    def _shown(self, name: str) -> str:
        load, enabled = self.loaded.get(name, ("not-found", ""))
        if name == "ufw.service":
            load, enabled = "loaded", "enabled"
        active = "active" if name in self.active | self.timers else "inactive"
        pid = self.pid if name == sshd.UNIT and name in self.active else 0
        return (
            f"Id={name}\nLoadState={load}\nUnitFileState={enabled}\nActiveState={active}\nMainPID={pid}\n"
            f"StateChangeTimestampMonotonic={self.changed_at if pid else 0}"
        )

    def reload(self) -> None:
        """systemd reads its links; until then it does not know of them."""
        folder = self.path("/etc/systemd/system")
        for name in (sshd.UNIT, *sshd.SOCKETS):
            place = folder / name
            masked = place.is_symlink() and str(place.readlink()) == "/dev/null"
            wanted = any(folder.glob(f"*.wants/{name}")) or any(folder.glob(f"*.requires/{name}"))
            known = name in (sshd.UNIT, "ssh.socket") or masked
            state = "masked" if masked else "enabled" if wanted else "disabled" if known else ""
            self.loaded[name] = ("masked" if masked else "loaded" if known else "not-found", state)

    # sshd.

    def start_sshd(self) -> None:
        self.pid += 1
        self.changed_at += 1
        # What it read then, it runs with until the next start.
        self.bound = self.wanted_listeners()
        self._listen()

    def stop_sshd(self) -> None:
        self.changed_at += 1
        self._listen()

    def wanted_listeners(self) -> list[tuple[str, int]]:
        drop_in = self.path(sshd.DROP_IN)
        if not drop_in.is_file():
            return [("0.0.0.0", 22)]
        here = [address for addresses in self.addresses.values() for address in addresses]
        named = sshd.listen_addresses(drop_in.read_text())
        return [(address, 22) for address in named if address in here or address == "0.0.0.0"]

    def _listen(self) -> None:
        rows = ["  sl  local_address rem_address   st"]
        for pid in self.path("/proc").iterdir():
            if pid.name.isdigit():
                for entry in (pid / "fd").glob("*"):
                    entry.unlink()
        pid_of_it = 1 if "ssh.socket" in self.active else self.pid
        bound = self.bound if sshd.UNIT in self.active else []
        listeners = [("0.0.0.0", 22)] if "ssh.socket" in self.active else bound
        for number, (address, port) in enumerate(listeners):
            rows.append(row(address, port, inode=500 + number))
            self.link(f"/proc/{pid_of_it}/fd/{number}", f"socket:[{500 + number}]")
        self.write("/proc/net/tcp", "\n".join(rows) + "\n")

    # The firewall.

    def _save(self, family: str) -> str:
        lines = ["*filter"]
        lines += [f":{chain} {policy} [12:34]" for chain, policy in self.policies[family].items()]
        lines += [f":{chain} - [0:0]" for chain in self.chains[family]]
        lines += [":DOCKER-USER - [0:0]", "-A DOCKER-USER -j RETURN"]
        if self.chains[family]:
            lines += [f"-A INPUT -j ufw{'6' if family == 'ipv6' else ''}-before-input"]
        lines += [rule for rules in self.chains[family].values() for rule in rules]
        return "\n".join([*lines, "COMMIT", ""])

    def _restore(self, family: str, text: str) -> None:
        for line in text.splitlines():
            words = line.split()
            if line.startswith(":"):
                name = words[0][1:]
                assert not name.startswith(("DOCKER", "ts-")), "chains of others are none of the guard's"
                if words[1] == "-":
                    self.chains[family][name] = []
                else:
                    self.policies[family][name] = words[1]
            elif words[:1] == ["-A"] and words[1] in self.chains[family]:
                self.chains[family][words[1]].append(line)

    def _ufw(self, *, on: bool) -> None:
        # In place, as ufw does it.
        with self.path(UFW_CONF).open("r+") as stream:
            stream.truncate()
            stream.write(f"ENABLED={'yes' if on else 'no'}\n")
        for family, six in (("ipv4", ""), ("ipv6", "6")):
            self.chains[family] = {}
            self.policies[family] |= {"INPUT": "DROP" if on else "ACCEPT"}
            if on:
                rules = [line for line in self.path(USER_RULES).read_text().splitlines() if line[:2] == "-A"]
                self.chains[family] = {f"ufw{six}-before-input": [], f"ufw{six}-user-input": []}
                for rule in rules:
                    self.chains[family][f"ufw{six}-user-input"].append(rule.replace("ufw-", f"ufw{six}-"))

    def switch_ufw_on(self, *rules: str) -> None:
        """ufw active with these rules, as an operator leaves it."""
        self.write(USER_RULES, "\n".join(["*filter", *rules, "COMMIT", ""]))
        self._ufw(on=True)

    # tailscale.

    def _tailscale(self, words: list[str]) -> str:
        assert self.prefs is not None
        if words[:1] == ["set"]:
            names = {"--ssh": "RunSSH", "--shields-up": "ShieldsUp", "--hostname": "Hostname"}
            for word in words[1:]:
                option, _, value = word.partition("=")
                if option in names:
                    self.prefs[names[option]] = {"true": True, "false": False}.get(value, value)
            return ""
        return json.dumps({**self.prefs, "ControlURL": "https://control.invalid"})

    # What a converge does to a host.

    def converge(self) -> None:
        """ufw active with another rule, sockets masked, sshd on the tailnet alone."""
        self.switch_ufw_on("-A ufw-user-input -i tailscale0 -j ACCEPT")
        self.write(sshd.MAIN, OLD_MAIN.replace("Port 22", "# quietport: was: Port 22"))
        self.write(sshd.DROP_IN, sshd.render([TAILNET]))
        self.write(sshd.UNIT_DROP_IN, "[Service]\nRestartSec=2\n")
        self.link("/etc/systemd/system/ssh.socket", "/dev/null")
        self.active.discard("ssh.socket")
        self.active.add(sshd.UNIT)
        self.reload()
        self.start_sshd()


def row(address: str, port: int, *, inode: int, remote: str = "", state: str = "0A") -> str:
    """A row of /proc/net/tcp."""
    there = remote or "00000000:0000"
    rest = "00000000:00000000 00:00000000 00000000     0        0"
    return f"   0: {hexed(address, port)} {there} {state} {rest} {inode} 1"


def hexed(address: str, port: int) -> str:
    packed = ipaddress.ip_address(address).packed
    words = [struct.unpack("<I", packed[at : at + 4])[0] for at in range(0, len(packed), 4)]
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"


def stat(pid: int, parent: int, *, ticks: int, name: str = "a) (b") -> str:
    """/proc/PID/stat of a process with a nasty name."""
    fields = ["S", str(parent), "1", "1", *["0"] * 15, str(ticks), *["0"] * 10]
    return f"{pid} ({name}) {' '.join(fields)}\n"


def left_in(world: World) -> list[str]:
    folder = world.path(state.FOLDER)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
