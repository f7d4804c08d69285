"""libvirt for the VM target: a daemon, a network a run, and whether KVM can be used.

A daemon that answers is used as it is. Where none does (a machine without systemd), the lab starts its own,
with its configuration laid over /etc/libvirt in a mount namespace of that daemon alone: the machine's files
are not touched, and what a crash leaves behind is nothing that starts again by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import shlex
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.network import MACHINE_DIR, allow, claim, prepare_machine
from lab.process import LabError, Process, alive, boot_id, run, spawn, step, stop, succeeds, wait_until
from lab.state import Run, Subnet, locked, write

URI = "qemu:///system"
ETC = Path("/etc/libvirt")
# Of the machine, not of a lab directory: there is one system daemon, and /run forgets it at a reboot as well.
RUNTIME = MACHINE_DIR / "libvirt"

# Without the root user and group, libvirt on a machine without systemd waits 108 s at every start of a
# domain; stdio_handler "logd" would need a virtlogd beside it.
QEMU_CONF = 'user = "root"\ngroup = "root"\nstdio_handler = "file"\n'

CHAIN_PREFIX = "LIBVIRT_"
KVM_WAIT_S = 15
PANIC = b"Kernel panic - not syncing"


# The daemon


@dataclass(frozen=True)
class Usage:
    """Who uses libvirt on this machine, and the daemon when it is the lab's."""

    users: tuple[str, ...] = ()
    """Directories of the runs that use it."""
    daemon: Process | None = None
    """The daemon, when the lab started it."""

    def to_json(self) -> dict[str, Any]:
        """For the usage file."""
        daemon = self.daemon.to_json() if self.daemon else None
        return {"users": list(self.users), "daemon": daemon}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Usage:
        """What `to_json` wrote."""
        daemon = Process.from_json(value["daemon"]) if value["daemon"] else None
        return Usage(users=tuple(value["users"]), daemon=daemon)


def answers() -> bool:
    """Whether a libvirt daemon answers on qemu:///system."""
    return succeeds(["virsh", "-c", URI, "-q", "uri"], timeout=10)


def acquire(run_: Run) -> None:
    """Make libvirt usable for the run; `release` gives it back.

    Raises LabError when this is not root, or the daemon does not come up.
    """
    if os.geteuid() != 0:
        raise LabError("The VM target needs root.", hint="Run it with sudo, or use the container target.")
    with locked(RUNTIME / "lock"):
        usage = _read_usage()
        usage = replace(usage, users=with_user(usage.users, run_.directory))
        _write_usage(usage)
        if answers():
            return
        if usage.daemon:
            stop(usage.daemon)
        with step("start the lab's libvirt daemon"):
            _write_usage(replace(usage, daemon=_start_daemon()))
            log = RUNTIME / "libvirtd.log"
            wait_until(answers, timeout=30, what="libvirtd answers", hint=f"Its log: {log}")


def release(run_: Run) -> None:
    """Give libvirt back; with the last run goes the daemon that the lab started. Fine when not acquired."""
    with locked(RUNTIME / "lock"):
        usage = _read_usage()
        users = without_user(usage.users, run_.directory)
        if users:
            _write_usage(replace(usage, users=users))
            return
        if usage.daemon and alive(usage.daemon):
            with step("stop the lab's libvirt daemon"):
                stop(usage.daemon)
        if usage.daemon:
            _remove_chains()
        shutil.rmtree(RUNTIME / "etc", ignore_errors=True)
        for name in ("usage.json", "libvirtd.log"):
            (RUNTIME / name).unlink(missing_ok=True)


def chain_removal(listing: str) -> list[list[str]]:
    """Arguments of iptables that remove libvirt's chains from a table (`-S` lists it): jumps, then chains."""
    lines = [shlex.split(line) for line in listing.splitlines()]
    chains = [words[1] for words in lines if words[:1] == ["-N"] and words[1].startswith(CHAIN_PREFIX)]
    rules = [words[1:] for words in lines if words[:1] == ["-A"]]
    jumps = [rule for rule in rules if rule[-2] == "-j" and rule[-1] in chains]
    return [["-D", *jump] for jump in jumps] + [[verb, chain] for verb in ("-F", "-X") for chain in chains]


def _remove_chains() -> None:
    """libvirtd leaves its chains behind, empty. Only after a daemon of the lab's: then nobody else's runs."""
    for program in ("iptables", "ip6tables"):
        for table in ("filter", "nat", "mangle"):
            listing = run([program, "-w", "-t", table, "-S"], check=False).stdout
            for words in chain_removal(listing):
                run([program, "-w", "-t", table, *words], check=False)


def with_user(users: Sequence[str], user: Path) -> tuple[str, ...]:
    """`users` and `user`, each once."""
    return tuple(dict.fromkeys([*users, str(user)]))


def without_user(users: Sequence[str], user: Path) -> tuple[str, ...]:
    """`users` without `user`, and without runs that are gone and used up nothing any more."""
    return tuple(other for other in users if other != str(user) and (Path(other) / "lab.json").is_file())


def _start_daemon() -> Process:
    etc = RUNTIME / "etc"
    etc.mkdir(parents=True, exist_ok=True)
    (etc / "qemu.conf").write_text(QEMU_CONF)
    # Slave propagation: what the machine mounts later is seen, what is mounted here stays here.
    # Without control groups in sight libvirt makes none. Containers beside it, whose systemd tidies the same
    # tree, would remove its groups between two of its steps.
    over = 'mount --bind "$1" "$2" && { umount --recursive --lazy /sys/fs/cgroup || true; } && exec libvirtd'
    shell = ["sh", "-c", over, "sh", str(etc), str(ETC)]
    argv = ["unshare", "--mount", "--propagation", "slave", *shell]
    return spawn(argv, log=RUNTIME / "libvirtd.log")


def _read_usage() -> Usage:
    try:
        return Usage.from_json(json.loads((RUNTIME / "usage.json").read_text()))
    except FileNotFoundError:
        return Usage()
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{RUNTIME / 'usage.json'} cannot be read: {error}.", hint="Remove it.") from error


def _write_usage(usage: Usage) -> None:
    write(RUNTIME / "usage.json", json.dumps(usage.to_json(), indent=1))


# virsh


def virsh(*words: str | os.PathLike[str], timeout: float = 60, input: str | None = None) -> str:
    """What `virsh WORDS` prints. Raises LabError when it fails."""
    return run(["virsh", "-c", URI, "-q", *words], timeout=timeout, input=input).stdout.strip()


def virsh_ok(*words: str | os.PathLike[str], timeout: float = 60) -> bool:
    """Whether `virsh WORDS` succeeds: for questions, and for removing what may be gone."""
    return succeeds(["virsh", "-c", URI, "-q", *words], timeout=timeout)


# The network


def mac_prefix(tag: str) -> str:
    """The first five bytes of the MAC addresses of a run's VMs, in QEMU's range 52:54:00."""
    digest = hashlib.sha256(tag.encode()).digest()
    return f"52:54:00:{digest[0]:02x}:{digest[1]:02x}"


def mac(tag: str, number: int) -> str:
    """MAC address of host `number` (1 to 254) of a run."""
    return f"{mac_prefix(tag)}:{number:02x}"


def network_xml(subnet: Subnet, hosts: Mapping[str, tuple[str, str]]) -> str:
    """A libvirt network, named like its bridge, with an address reserved for each of `hosts` (MAC, IPv4).

    Mode `open`: the firewall is the lab's own business (lab.network). IPv4 only: for a network with IPv6
    libvirt switches IPv6 forwarding on, and refuses where that costs the machine its own route; the lab gives
    the bridge its IPv6 address itself.
    """
    network = ET.Element("network")
    ET.SubElement(network, "name").text = subnet.bridge
    ET.SubElement(network, "forward", mode="open")
    ET.SubElement(network, "bridge", name=subnet.bridge, stp="off", delay="0")
    # vagrant-libvirt reads the netmask and knows no prefix.
    netmask = str(ipaddress.IPv4Network(subnet.ipv4).netmask)
    ip = ET.SubElement(network, "ip", address=subnet.host4(1), netmask=netmask)
    dhcp = ET.SubElement(ip, "dhcp")
    ET.SubElement(dhcp, "range", start=subnet.host4(128), end=subnet.host4(199))
    for host, (hardware, address) in hosts.items():
        ET.SubElement(dhcp, "host", mac=hardware, name=host, ip=address)
    return ET.tostring(network, encoding="unicode")


def network_up(run_: Run, hosts: Mapping[str, int]) -> Subnet:
    """Make the run's network for VMs, with an address reserved for each of `hosts` (name: host number).

    Does nothing when it is up. Raises LabError when libvirt refuses it.
    """
    subnet = claim(run_, "vm")
    prepare_machine(run_)
    # Before the first guest asks for an address: a machine with a firewall would not hear it.
    allow(run_, subnet)
    if not virsh_ok("net-info", subnet.bridge):
        reserved = {name: (mac(run_.tag, number), subnet.host4(number)) for name, number in hosts.items()}
        virsh("net-define", "/dev/stdin", input=network_xml(subnet, reserved))
    if info(virsh("net-info", subnet.bridge)).get("Active") != "yes":
        virsh("net-start", subnet.bridge)
    # libvirt switches IPv6 off on the bridge of a network that has none of its own.
    (Path("/proc/sys/net/ipv6/conf") / subnet.bridge / "disable_ipv6").write_text("0")
    # nodad: without a guest there is no carrier, and duplicate detection would never end.
    run(["ip", "-6", "address", "replace", f"{subnet.host6(1)}/64", "dev", subnet.bridge, "nodad"])
    return subnet


def network_down(bridge: str) -> None:
    """Stop and forget the network on that bridge. Fine when it is gone."""
    if virsh_ok("net-info", bridge):
        virsh_ok("net-destroy", bridge)
        virsh("net-undefine", bridge)


def info(text: str) -> dict[str, str]:
    """The `Name:   value` lines that virsh prints about one thing."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


# KVM


def driver(kernel: Path) -> str:
    """`kvm` where it works, else `qemu` (emulation). QUIETPORT_VM_DRIVER decides without asking.

    A /dev/kvm that opens says little: nested, a stock kernel may hang on it. So `kernel` is booted without a
    disk, and has to reach its panic within 15 s. The answer, kept beside the kernel, holds for this boot of
    the machine. Raises LabError when the variable names something else.
    """
    if named := os.environ.get("QUIETPORT_VM_DRIVER"):
        if named not in ("kvm", "qemu"):
            raise LabError(f"QUIETPORT_VM_DRIVER is {named!r}.", hint="It is kvm or qemu.")
        return named
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "qemu"
    verdict = kernel.parent / "kvm.json"
    with locked(kernel.parent / ".kvm.lock"):
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(verdict.read_text())
            if kept.get("boot") == boot_id():
                return str(kept["driver"])
        with step("KVM is tried"):
            found = "kvm" if kernel_boots(kvm_command(kernel)) else "qemu"
        write(verdict, json.dumps({"boot": boot_id(), "driver": found}))
    return found


def kvm_command(kernel: Path) -> list[str]:
    """The command that boots `kernel` under KVM until it panics for want of a root file system."""
    machine = ["-machine", "pc,accel=kvm", "-cpu", "host", "-smp", "2", "-m", "512", "-nodefaults"]
    ends = ["-no-reboot", "-display", "none", "-serial", "stdio"]
    boots = ["-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    return ["qemu-system-x86_64", *machine, *ends, *boots]


def kernel_boots(command: Sequence[str], *, wait: float = KVM_WAIT_S) -> bool:
    """Whether the command's output shows a kernel's panic within `wait` seconds."""
    pipe = subprocess.PIPE
    try:
        machine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
        )
    except FileNotFoundError:
        return False
    try:
        seen, _ = machine.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        os.killpg(machine.pid, signal.SIGKILL)
        seen, _ = machine.communicate()
    return PANIC in seen
