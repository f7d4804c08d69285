"""VM targets: blank Debian hosts under libvirt and QEMU, described by the Vagrantfile.

Vagrant makes and destroys them. Everything between goes through libvirt and the guest agent, because
Vagrant would log in over the public address, and a converged host answers nobody there.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import box, keys, libvirt, public
from lab.network import IPV6_POOL
from lab.process import LabError, run, say, step, wait_until
from lab.state import Run, Subnet, Target, cache_root, locked

PROJECT = Path(__file__).resolve().parent.parent
NAMES = {"trixie": "v13", "bookworm": "v12"}
IMAGES = Path("/var/lib/libvirt/images")
"""Where QEMU may read and write, whatever user the machine's libvirt runs it as."""
SNAPSHOT = "lab"

# nice(2) of an emulated VM: it is slower than anything else that runs here, and is waited for longest.
HURRY = -10

# Seconds. Emulation on two busy cores is slow, and a wait that is too short costs a whole run.
UP_TIMEOUT = 1800
BOOT_TIMEOUT = 900
# An emulated processor, shared with others, takes so many times as long as one of this machine's.
EMULATED = 5
# A request is one word of a command line, 128 KiB at most (MAX_ARG_STRLEN), and base64 adds a third.
CHUNK = 60_000

GUEST_ENVIRONMENT = (
    "HOME=/root",
    "LANG=C.UTF-8",
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
)


# Names


def number_of(distro: str) -> int:
    """Host number in the run's network, and last byte of the MAC address: the Debian's number."""
    return int(NAMES[distro][1:])


def prefix(run_: Run) -> str:
    """What the names of the run's domains begin with; the distribution's name follows."""
    return f"qp-{run_.id}-{run_.tag}-"


def directory(run_: Run) -> Path:
    """Disks, kernels and console logs of the run's VMs; also a libvirt storage pool of the same name."""
    return IMAGES / f"quietport-{run_.tag}"


def describe(run_: Run, distro: str, subnet: Subnet, *, driver: str) -> Target:
    """The target as it will be: Debian N has host number N, its public side number 100 + N."""
    name, number = NAMES[distro], number_of(distro)
    return Target(
        name=name,
        kind="vm",
        distro=distro,
        public_ip=subnet.host4(number),
        public_ip6=subnet.host6(number),
        bridge=subnet.bridge,
        namespace=public.namespace_name(run_, name),
        peer_ip=subnet.host4(100 + number),
        peer_ip6=subnet.host6(100 + number),
        detail={
            "console": str(directory(run_) / f"{distro}.console.log"),
            "domain": prefix(run_) + distro,
            "driver": driver,
        },
    )


def vagrant_env(run_: Run, subnet: Subnet, *, driver: str, boxes: Mapping[str, str]) -> dict[str, str]:
    """The environment that makes the Vagrantfile describe this run's VMs and no others.

    `driver` is kvm or qemu; `boxes` are Vagrant's names of the boxes, by distribution.
    """
    place = directory(run_)
    return {
        "LIBVIRT_DEFAULT_URI": libvirt.URI,
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "VAGRANT_CWD": str(PROJECT),
        "VAGRANT_DEFAULT_PROVIDER": "libvirt",
        "VAGRANT_DOTFILE_PATH": str(run_.directory / "vagrant"),
        # The boxes of the person whose machine this is stay as they are.
        "VAGRANT_HOME": str(cache_root() / "vagrant"),
        "VAGRANT_NO_COLOR": "1",
        "QUIETPORT_LAB_CACHE": str(cache_root()),
        "QUIETPORT_VM_DIRECTORY": str(place),
        "QUIETPORT_VM_DRIVER": driver,
        "QUIETPORT_VM_KEY": str(keys.operator_key(run_)),
        "QUIETPORT_VM_MAC_PREFIX": libvirt.mac_prefix(run_.tag),
        "QUIETPORT_VM_NETWORK": subnet.bridge,
        "QUIETPORT_VM_POOL": place.name,
        "QUIETPORT_VM_PREFIX": prefix(run_),
        "QUIETPORT_VM_SUBNET": subnet.ipv4,
        **{f"QUIETPORT_VM_BOX_{distro.upper()}": name for distro, name in boxes.items()},
    }


# Coming and going


def create(run_: Run, distro: str, name: str) -> Target:
    """Boot a blank host and its public side; one of that name that is there is taken away first.

    A run has one VM of each Debian, with a name of its own: the Vagrantfile describes no others.
    Raises LabError that says what did not come up.
    """
    if name != NAMES[distro]:
        sentence = f"The VM with {distro} is called {NAMES[distro]}."
        raise LabError(sentence, hint="A run has one VM of each Debian; another run may have another.")
    image = box.build(distro)
    subnet = ensure_network(run_)
    driver = libvirt.driver(image.kernel)
    target = describe(run_, distro, subnet, driver=driver)
    destroy(run_, target)
    run_.save_target(target)
    env = vagrant_env(run_, subnet, driver=driver, boxes={distro: image.name})
    log = run_.logs / f"{target.name}-vagrant.log"
    _storage(run_, image, distro)
    _add_box(image, env, log)
    how = "KVM" if driver == "kvm" else "emulated: KVM does not work here"
    with step(f"blank Debian host {target.name} ({distro}, VM, {how})"):
        run(["vagrant", "up", distro], env=env, log=log, timeout=UP_TIMEOUT)
        _hurry(target)
        _wait_booted(target)
        execute(target, ["sh", "-c", furnishing(target, subnet)])
        _neighbours(target)
    return run_.save_target(replace(target, state="running"))


def _hurry(target: Target) -> None:
    """Let an emulated VM go before the containers beside it. Nothing depends on it."""
    if target.detail["driver"] != "qemu":
        return
    with contextlib.suppress(OSError, ValueError):
        pid = int(Path(f"/run/libvirt/qemu/{_domain(target)}.pid").read_text())
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), HURRY)
        # Where the kernel groups by session, nice(2) counts inside the group alone (sched(7), autogroup).
        Path(f"/proc/{pid}/autogroup").write_text(str(HURRY))


def ensure_network(run_: Run) -> Subnet:
    """Make libvirt answer and the run's network for VMs be there. Raises LabError."""
    libvirt.acquire(run_)
    return libvirt.network_up(run_, {name: number_of(distro) for distro, name in NAMES.items()})


def _storage(run_: Run, image: box.Box, distro: str) -> None:
    place = directory(run_)
    place.mkdir(mode=0o711, parents=True, exist_ok=True)
    if not libvirt.virsh_ok("pool-info", place.name):
        libvirt.virsh("pool-define-as", place.name, "dir", "--target", place)
    if libvirt.info(libvirt.virsh("pool-info", place.name)).get("State") != "running":
        libvirt.virsh("pool-start", place.name)
    shutil.copy(image.kernel, place / f"{distro}.vmlinuz")
    shutil.copy(image.initrd, place / f"{distro}.initrd")


def _add_box(image: box.Box, env: Mapping[str, str], log: Path) -> None:
    home = Path(env["VAGRANT_HOME"])
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(home / ".box.lock"):
        if not (home / "boxes" / image.name / "0/libvirt/metadata.json").is_file():
            with step(f"give the box {image.name} to Vagrant"):
                run(["vagrant", "box", "add", "--force", "--name", image.name, image.file], env=env, log=log)


def furnishing(target: Target, subnet: Subnet) -> str:
    """The script that does a provider's part at the first boot: the host's name, and its IPv6 address.

    IPv6 leads to the lab's networks only: with a default route, every program that tries IPv6 first would
    wait for a timeout.
    """
    name = shlex.quote(target.name)
    networks = IPV6_POOL.replace(":{}::/64", "::/48")
    route = f"ip -6 route replace {networks} via {subnet.host6(1)} dev eth0"
    interface = (
        f"iface eth0 inet6 static\n    address {target.public_ip6}/64\n    dad-attempts 0\n    up {route}\n"
    )
    lines = [
        "set -eu",
        f"echo {name} >/etc/hostname",
        f"hostname {name}",
        f"echo 127.0.1.1 {name} >>/etc/hosts",
        f"printf %s {shlex.quote(interface)} >/etc/network/interfaces.d/public6",
        f"ip -6 address replace {target.public_ip6}/64 dev eth0 nodad",
        route,
    ]
    return "\n".join(lines)


def start(run_: Run, target: Target) -> Target:
    """Start a VM that is off, wait until it is up, and make its public side whole. Raises LabError."""
    ensure_network(run_)
    if state(target) != "running":
        libvirt.virsh("start", _domain(target))
    _hurry(target)
    _wait_booted(target)
    _neighbours(target)
    return run_.save_target(replace(target, state="running"))


def _neighbours(target: Target) -> None:
    """Make the public side whole, and the cable to the VM wide enough for a scan of all ports.

    An emulated machine takes packets slower than a scan sends them: with the default queue of 1000 a tenth
    of the ports seemed silent that were closed. The interface goes with the VM, and this with it.
    """
    for interface in interfaces(libvirt.virsh("domiflist", _domain(target))):
        run(["ip", "link", "set", interface, "txqueuelen", "20000"])
    run(["ip", "neigh", "flush", "dev", target.bridge], check=False)
    public.create(target)


def interfaces(text: str) -> list[str]:
    """This machine's ends of a VM's cables, from what `virsh domiflist` prints."""
    rows = (line.split() for line in text.splitlines())
    return [row[0] for row in rows if len(row) == 5 and row[1] == "network" and row[0] != "-"]


def destroy(run_: Run, target: Target) -> None:
    """Take a VM away, with its disk, snapshot and public side, also one half made. Gone already is fine."""
    public.remove(target)
    subnet = run_.read().networks.get("vm")
    # Vagrant first, so that it forgets what it made; libvirt knows of the rest.
    if subnet and (run_.directory / "vagrant").is_dir() and _exists(_domain(target)):
        env = vagrant_env(run_, subnet, driver=target.detail["driver"], boxes={})
        run(["vagrant", "destroy", "-f", target.distro], env=env, timeout=180, check=False)
    _erase(_domain(target))
    # The disk of one whose domain was never defined; Vagrant would stumble over it.
    libvirt.virsh_ok("vol-delete", f"{_domain(target)}.img", "--pool", directory(run_).name)
    for file in directory(run_).glob(f"{target.distro}.*"):
        file.unlink()
    run_.forget_target(target.name)


def sweep(run_: Run) -> None:
    """Remove all VMs of the run, their network and storage, and give libvirt back.

    Goes by the run's mark, whether its state knows of a thing or not. Fine when there is nothing.
    """
    subnet = run_.read().networks.get("vm")
    if subnet is None and not directory(run_).is_dir():
        return
    # A crash may have taken the lab's daemon away with domains still there.
    libvirt.acquire(run_)
    for name in libvirt.virsh("list", "--all", "--name").split():
        if name.startswith(prefix(run_)):
            _erase(name)
    pool = directory(run_).name
    if libvirt.virsh_ok("pool-info", pool):
        libvirt.virsh_ok("pool-destroy", pool)
        libvirt.virsh("pool-undefine", pool)
    if subnet:
        libvirt.network_down(subnet.bridge)
    shutil.rmtree(directory(run_), ignore_errors=True)
    libvirt.release(run_)


def _domain(target: Target) -> str:
    return target.detail["domain"]


def _exists(domain: str) -> bool:
    return libvirt.virsh_ok("dominfo", domain)


def _erase(domain: str) -> None:
    if _exists(domain):
        libvirt.virsh_ok("destroy", domain)
        libvirt.virsh("undefine", domain, "--snapshots-metadata", "--remove-all-storage", "--managed-save")


# Inside, without SSH


def execute(
    target: Target,
    command: Sequence[str],
    *,
    check: bool = True,
    timeout: float = 120,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the VM as root through the guest agent, past its network, sshd and firewall.

    `timeout` is in seconds, of a machine's own processor: an emulated one gets EMULATED times that. Raises
    LabError when the agent does not answer, when the command takes longer (it goes on in there), and, with
    `check`, when it fails.
    """
    if target.detail["driver"] == "qemu":
        timeout *= EMULATED
    request: dict[str, Any] = {
        "path": command[0],
        "arg": list(command[1:]),
        "env": list(GUEST_ENVIRONMENT),
        "capture-output": True,
    }
    if input is not None:
        if len(input.encode()) > CHUNK:
            raise LabError(f"{target.name}: {command[0]}: more than {CHUNK} bytes of input.")
        request["input-data"] = base64.b64encode(input.encode()).decode()
    pid = _agent(target, "guest-exec", request)["pid"]
    end = time.monotonic() + timeout
    pause = 0.1
    while not (status := _agent(target, "guest-exec-status", {"pid": pid}))["exited"]:
        if time.monotonic() > end:
            raise LabError(f"{target.name}: {shlex.join(command)}: still not done after {timeout:g} s.")
        # Asking costs the VM time, too.
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)
    done = finished(command, status)
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise LabError(f"{target.name}: {shlex.join(command)}: exit code {done.returncode}: {said}")
    return done


def finished(command: Sequence[str], status: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """The agent's answer to guest-exec-status. A command that signal N ended has exit code -N."""
    code = int(status["exitcode"]) if "exitcode" in status else -int(status["signal"])
    out, err = (
        base64.b64decode(status.get(key, "")).decode(errors="replace") for key in ("out-data", "err-data")
    )
    return subprocess.CompletedProcess(list(command), code, out, err)


def copy_in(target: Target, source: Path, destination: str) -> None:
    """Copy a file into the VM through the guest agent; it belongs to root, mode 0644. About 1 MB a second."""
    handle = _agent(target, "guest-file-open", {"path": destination, "mode": "w"})
    try:
        with source.open("rb") as stream:
            while part := stream.read(CHUNK):
                data = base64.b64encode(part).decode()
                _agent(target, "guest-file-write", {"handle": handle, "buf-b64": data})
    finally:
        _agent(target, "guest-file-close", {"handle": handle})
    execute(target, ["chmod", "0644", destination])


def _agent(target: Target, verb: str, arguments: Mapping[str, Any], *, timeout: int = 60) -> Any:
    """Ask the guest agent. Raises LabError when it does not answer within `timeout` seconds."""
    request = json.dumps({"execute": verb, "arguments": dict(arguments)})
    try:
        answer = libvirt.virsh(
            "qemu-agent-command", _domain(target), "--timeout", str(timeout), request, timeout=timeout + 10
        )
    except LabError as error:
        # The whole command line repeats the request, at length; what went wrong comes last.
        said = error.what.rpartition("error: ")[2]
        raise LabError(f"{target.name}: the guest agent, asked for {verb}: {said}") from None
    return json.loads(answer)["return"]


def _boot_id(target: Target) -> str:
    """The VM's running boot, or nothing when the agent does not answer."""
    try:
        return execute(target, ["cat", "/proc/sys/kernel/random/boot_id"], timeout=20).stdout.strip()
    except LabError:
        return ""


def _wait_booted(target: Target, *, other_than: str = "") -> None:
    """Wait until systemd has done all it will, in a boot other than `other_than`. Raises LabError."""
    hint = f"Its console: {target.detail['console']}"

    def answered() -> bool:
        return _boot_id(target) not in ("", other_than)

    what = f"the guest agent of {target.name} answers"
    wait_until(answered, timeout=BOOT_TIMEOUT, interval=1, what=what, hint=hint)

    def settled() -> str:
        word = execute(target, ["systemctl", "is-system-running"], check=False).stdout.strip()
        return word if word in ("running", "degraded") else ""

    what = f"systemd in {target.name} is up"
    if wait_until(settled, timeout=BOOT_TIMEOUT, interval=1, what=what, hint=hint) == "degraded":
        listed = execute(target, ["systemctl", "--failed", "--plain", "--no-legend"], check=False)
        failed = ", ".join(line.split()[0] for line in listed.stdout.splitlines() if line.strip())
        say(f"  {target.name} is up, with failed units: {failed}")


# Between


def restart(run_: Run, target: Target) -> None:
    """Reboot the VM as an operator would, and wait until it is up again. Raises LabError."""
    before = _boot_id(target)
    # --no-block: the agent has answered before systemd ends it.
    execute(target, ["systemctl", "--no-block", "reboot"])
    _wait_booted(target, other_than=before)
    run_.save_target(replace(target, state="running"))


def power_off(run_: Run, target: Target) -> None:
    """Cut the VM's power: nothing in it is told. `start` brings it back. Off already is fine."""
    if state(target) == "running":
        libvirt.virsh("destroy", _domain(target))
    run_.save_target(replace(target, state="stopped"))


def snapshot(run_: Run, target: Target) -> None:
    """Keep the VM as it is now, memory included. One snapshot, the newest. Raises LabError."""
    if has_snapshot(target):
        libvirt.virsh("snapshot-delete", _domain(target), SNAPSHOT, timeout=300)
    libvirt.virsh("snapshot-create-as", _domain(target), SNAPSHOT, timeout=300)


def has_snapshot(target: Target) -> bool:
    """Whether `restore` has something to go back to."""
    return SNAPSHOT in libvirt.virsh("snapshot-list", _domain(target), "--name").split()


def restore(run_: Run, target: Target) -> None:
    """Put the VM back to its snapshot, running, with its clock set to now. Raises LabError without one."""
    if not has_snapshot(target):
        raise LabError(
            f"{target.name} has no snapshot.", hint=f"`python -m lab snapshot {target.name}` takes one."
        )
    libvirt.virsh("snapshot-revert", _domain(target), SNAPSHOT, "--running", "--force", timeout=300)
    wait_until(
        lambda: _boot_id(target), timeout=60, what=f"the guest agent of {target.name} answers after a restore"
    )
    # Its memory says it is still then, and a certificate made since would be one of the future. (The guest
    # agent's own way to set the time wants hwclock, which Debian 13 has in a package of its own.)
    execute(target, ["date", "--utc", "--set", f"@{time.time():.3f}"])
    _neighbours(target)
    run_.save_target(replace(target, state="running"))


def state(target: Target) -> str:
    """running or stopped, as libvirt sees it; gone when libvirt answers and does not know it."""
    if not libvirt.answers():
        return "stopped"
    if not _exists(_domain(target)):
        return "gone"
    return "running" if libvirt.virsh("domstate", _domain(target)) == "running" else "stopped"


def logs(target: Target) -> str:
    """What the VM wrote to its serial console since it was last started."""
    file = Path(target.detail["console"])
    return file.read_text(errors="replace") if file.is_file() else ""
