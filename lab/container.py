"""Container targets: a blank Debian host as a systemd container, with addresses of its own.

It is Docker's in name only: systemd is its first process, /run is fresh after every restart, name and
resolver are plain files of its own, and containers run inside it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lab import engine as engines
from lab import images, keys, network, public
from lab.engine import LABEL, Engine
from lab.process import LabError, Process, alive, identify, run, say, step, wait_until
from lab.state import Run, Subnet, Target, write

NAMES = {"trixie": "c13", "bookworm": "c12"}
NUMBERS = range(20, 100)
BOOT_TIMEOUT = 90
CGROUP = Path("/sys/fs/cgroup")
# Neither the privileged mode nor all capabilities: machines without CAP_SYS_RESOURCE refuse both.
RIGHTS = (
    "--cap-add=ALL",
    "--cap-drop=SYS_RESOURCE",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    # Else no container starts in it: runc cannot mount a /proc below one that is partly covered.
    "--security-opt=systempaths=unconfined",
    # A daemon that remaps users would leave the target without rights over its own network.
    "--userns=host",
    "--sysctl=net.ipv6.conf.all.disable_ipv6=0",
    "--sysctl=net.ipv6.conf.default.disable_ipv6=0",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEVICES = ("/dev/net/tun", "/dev/fuse")


def number_for(run_: Run, distro: str, name: str) -> int:
    """Host number of a target in the run's network: Debian N has N under its usual name, others a free one.

    Its public side is number 100 + N. Raises LabError when none is left.
    """
    if name == NAMES[distro]:
        return int(name[1:])
    others = [target for target in run_.read().targets.values() if target.kind == "container"]
    taken = {target.public_ip.rpartition(".")[2] for target in others if target.name != name}
    free = (number for number in NUMBERS if str(number) not in taken)
    number = next(free, None)
    if number is None:
        sentence = f"Lab run {run_.id!r} has no address left for {name}."
        raise LabError(sentence, hint="Use another run: --run ID.")
    return number


def describe(run_: Run, distro: str, subnet: Subnet, name: str) -> Target:
    """The target as it will be."""
    number = number_for(run_, distro, name)
    return Target(
        name=name,
        kind="container",
        distro=distro,
        public_ip=subnet.host4(number),
        public_ip6=subnet.host6(number),
        bridge=subnet.bridge,
        namespace=public.namespace_name(run_, name),
        peer_ip=subnet.host4(100 + number),
        peer_ip6=subnet.host6(100 + number),
        detail={"container": f"qp-{run_.tag}-{name}"},
    )


def reserve(run_: Run, distro: str, subnet: Subnet, name: str) -> Target:
    """Write the target down with addresses that no other one has or gets."""
    with run_.lock("addresses"):
        return run_.save_target(describe(run_, distro, subnet, name))


def create(run_: Run, distro: str, name: str) -> Target:
    """Boot a blank host and its public side. Raises LabError that says what did not come up."""
    # Several may be made at the same time; what they share is made by the first.
    with run_.lock("shared"):
        engine = engines.acquire(run_)
        image = images.ensure(engine, distro)
        subnet = network.ensure_container(run_, engine)
        keys.operator_key(run_)
    target = reserve(run_, distro, subnet, name)
    with step(f"blank Debian host {target.name} ({distro}, container)"):
        engine.docker("rm", "--force", "--volumes", _container(target), check=False)
        _make(run_, engine, target, image)
        _give_keys(run_, engine, target)
        _boot(engine, target)
    return run_.save_target(replace(target, state="running"))


def start(run_: Run, target: Target) -> Target:
    """Start a target that is down, and make its public side whole."""
    engine = engines.acquire(run_)
    network.ensure_container(run_, engine)
    _boot(engine, target)
    return run_.save_target(replace(target, state="running"))


def destroy(run_: Run, target: Target) -> None:
    """Take a target away, with its public side and its snapshot. Gone already is fine."""
    public.remove(target)
    if engine := engines.attached(run_):
        engine.docker("rm", "--force", "--volumes", _container(target), check=False)
        engine.docker("image", "rm", "--force", _snapshot(run_, target), check=False)
    run_.forget_target(target.name)


def restart(run_: Run, target: Target) -> None:
    """Restart it, as a reboot would: every process ends and /run is empty after. Waits for systemd."""
    engine = _engine(run_)
    engine.docker("restart", "--time", "30", _container(target))
    _boot(engine, target)
    run_.save_target(replace(target, state="running"))


def snapshot(run_: Run, target: Target) -> None:
    """Keep the target's disk as it is now, containers in it included. One snapshot, the newest."""
    engine = _engine(run_)
    _enter(_pid(engine, target), target, ["sync"])
    engine.docker("commit", f"--change=LABEL {LABEL}={run_.tag}", _container(target), _snapshot(run_, target))
    _remove_dangling(run_, engine)


def restore(run_: Run, target: Target) -> None:
    """Boot the target from its snapshot: same name, addresses and host keys. Raises LabError without one."""
    engine = _engine(run_)
    image = _snapshot(run_, target)
    if engine.docker("image", "inspect", image, check=False).returncode != 0:
        raise LabError(
            f"{target.name} has no snapshot.", hint=f"`python -m lab snapshot {target.name}` takes one."
        )
    engine.docker("rm", "--force", "--volumes", _container(target))
    _make(run_, engine, target, image)
    _boot(engine, target)
    run_.save_target(replace(target, state="running"))


def state(run_: Run, target: Target) -> str:
    """running or stopped, as Docker sees it; gone when Docker does not know it."""
    engine = engines.attached(run_)
    if engine is None:
        return "stopped"
    done = engine.docker("inspect", "--format", "{{.State.Running}}", _container(target), check=False)
    if done.returncode != 0:
        return "gone"
    return "running" if done.stdout.strip() == "true" else "stopped"


def execute(
    run_: Run,
    target: Target,
    command: Sequence[str],
    *,
    check: bool = True,
    timeout: float = 120,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the target as root, past its sshd and its firewall: what the lab itself does."""
    return _enter(first_pid(run_, target), target, command, check=check, timeout=timeout, input=input)


def first_pid(run_: Run, target: Target) -> int:
    """The process id that the target's systemd has on this machine. Raises LabError when it does not run."""
    known = _FIRST.get(_container(target))
    return known.pid if known is not None and alive(known) else _pid(_engine(run_), target)


# By container: asked many times a second, and Docker's client is a large program.
_FIRST: dict[str, Process] = {}


def _pid(engine: Engine, target: Target) -> int:
    inspect = engine.docker("inspect", "--format", "{{.State.Pid}}", _container(target), check=False)
    pid = inspect.stdout.strip()
    if not pid.isdigit() or pid == "0":
        raise LabError(
            f"{target.name} does not run.", hint="`python -m lab up` with the same target starts it."
        )
    _FIRST[_container(target)] = identify(int(pid))
    return int(pid)


def _enter(
    pid: int,
    target: Target,
    command: Sequence[str],
    *,
    check: bool = True,
    timeout: float = 120,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the target, whose first process is `pid`.

    Not `docker exec`: where cgroup v1 and v2 are mixed it fails (EBUSY) as soon as a container ran inside,
    because it wants a process in a control group that by then hands out controllers.
    """
    enter = ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
    # Nothing of this machine's environment belongs into the target.
    clean = ["env", "--ignore-environment", f"PATH={PATH}", "HOME=/root", "LC_ALL=C.UTF-8"]
    done = run([*enter, *clean, *command], check=False, timeout=timeout, input=input)
    if check and done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or "no output"
        raise LabError(f"{target.name}: {shlex.join(command)}: exit code {done.returncode}: {said}")
    return done


def copy_in(run_: Run, target: Target, source: Path, destination: str) -> None:
    """Copy a file into the target, past its sshd; it belongs to root."""
    _engine(run_).docker("cp", source, f"{_container(target)}:{destination}")


def sweep(run_: Run, engine: Engine | None) -> None:
    """Remove whatever in Docker has the run's label, known to its state or not."""
    if engine is None:
        return
    label = f"label={LABEL}={run_.tag}"
    found = engine.docker("ps", "--all", "--quiet", "--filter", label, check=False).stdout.split()
    if found:
        engine.docker("rm", "--force", "--volumes", *found, check=False)
    left = engine.docker("image", "ls", "--quiet", "--filter", label, check=False).stdout.split()
    if left:
        engine.docker("image", "rm", "--force", *sorted(set(left)), check=False)


def _engine(run_: Run) -> Engine:
    found = engines.attached(run_)
    if found is None:
        raise LabError(
            f"The Docker daemon of run {run_.id!r} does not answer.", hint="`python -m lab up` mends it."
        )
    return found


def _container(target: Target) -> str:
    return target.detail["container"]


def _snapshot(run_: Run, target: Target) -> str:
    return f"quietport-lab/snapshot:{run_.tag}-{target.name}"


def _remove_dangling(run_: Run, engine: Engine) -> None:
    """The snapshot before this one lost its name to it."""
    filters = ["--filter", "dangling=true", "--filter", f"label={LABEL}={run_.tag}"]
    if old := engine.docker("image", "ls", "--quiet", *filters).stdout.split():
        engine.docker("image", "rm", *old, check=False)


def _make(run_: Run, engine: Engine, target: Target, image: str) -> None:
    devices = [f"--device={device}" for device in DEVICES if Path(device).exists()]
    engine.docker(
        "create",
        f"--name={_container(target)}",
        f"--hostname={target.name}",
        f"--label={LABEL}={run_.tag}",
        f"--network={target.bridge}",
        f"--ip={target.public_ip}",
        f"--ip6={target.public_ip6}",
        "--stop-signal=SIGRTMIN+3",
        "--env=container=docker",
        "--tmpfs=/run:exec,mode=755",
        "--tmpfs=/run/lock:mode=1777",
        "--tmpfs=/tmp:exec,mode=1777",
        *RIGHTS,
        *devices,
        *cgroup_flags(cgroup_mode(CGROUP), target.distro),
        image,
        "/bin/sh",
        "-c",
        first_process(target.name, network.default_nameservers()),
    )


def cgroup_mode(root: Path) -> str:
    """`pure` (v2 alone), `hybrid` (v1 with v2 beside it) or `legacy` (v1 alone)."""
    if (root / "cgroup.controllers").is_file():
        return "pure"
    return "hybrid" if (root / "unified/cgroup.procs").is_file() else "legacy"


def cgroup_flags(mode: str, distro: str) -> list[str]:
    """Docker's flags that give systemd the control groups it wants. Raises LabError where it cannot be."""
    if mode == "pure":
        # Mounted read-only for it; `first_process` makes that writable.
        return ["--cgroupns=private"]
    if mode == "hybrid":
        # The v2 tree alone: systemd 256 and newer refuse v1, and with v1 in sight bookworm's containers
        # inside do not start (runc looks for their groups below the wrong root).
        return ["--cgroupns=host", f"--volume={CGROUP}/unified:/sys/fs/cgroup:rw"]
    if distro == "bookworm":
        return ["--cgroupns=private", f"--volume={CGROUP}:/sys/fs/cgroup:rw"]
    raise LabError(
        f"{distro} needs cgroup v2, and this machine has v1 alone.", hint="Boot it with cgroup v2."
    )


def first_process(name: str, nameservers: Sequence[str]) -> str:
    """The script that becomes systemd, after giving the host files of its own where Docker put mounts.

    tailscale and others replace /etc/resolv.conf by renaming, which a mount point does not allow.
    """
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost ip6-loopback\n"
    resolver = "".join(f"nameserver {server}\n" for server in nameservers)
    lines = [
        # Only where /sys/fs/cgroup is a mount of the container's own namespace, on pure v2.
        "[ -w /sys/fs/cgroup/cgroup.procs ] || mount -o remount,rw,bind /sys/fs/cgroup || true",
        f'resolver={shlex.quote(resolver)}; [ -n "$resolver" ] || resolver=$(cat /etc/resolv.conf)',
        "for file in resolv.conf hostname hosts; do umount /etc/$file || true; done",
        '[ -s /etc/resolv.conf ] || printf "%s\\n" "$resolver" > /etc/resolv.conf',
        f"[ -s /etc/hostname ] || echo {shlex.quote(name)} > /etc/hostname",
        f"[ -s /etc/hosts ] || printf %s {shlex.quote(hosts)} > /etc/hosts",
        "exec /sbin/init",
    ]
    return "\n".join(lines)


def _give_keys(run_: Run, engine: Engine, target: Target) -> None:
    """Host keys of its own, and the operator's key for root: what a provider does at the first boot."""
    engine.docker("cp", f"{keys.host_keys(run_, target.name)}/.", f"{_container(target)}:/etc/ssh/")
    authorized = run_.keys / "authorized_keys"
    write(authorized, keys.operator_public_key(run_) + "\n")
    engine.docker("cp", authorized, f"{_container(target)}:/root/.ssh/authorized_keys")


def _boot(engine: Engine, target: Target) -> None:
    """Start it and wait for systemd; then its public side, whose cable goes when the bridge does."""
    engine.docker("start", _container(target))

    def settled() -> str:
        done = _enter(
            _pid(engine, target), target, ["systemctl", "is-system-running"], check=False, timeout=30
        )
        word = done.stdout.strip()
        return word if word in ("running", "degraded") else ""

    word = wait_until(
        settled,
        timeout=BOOT_TIMEOUT,
        what=f"systemd in {target.name} is up",
        hint=f"See: {shlex.join(engine.argv('logs', _container(target)))}",
    )
    if word == "degraded":
        listed = _enter(
            _pid(engine, target), target, ["systemctl", "--failed", "--plain", "--no-legend"], check=False
        )
        failed = ", ".join(line.split()[0] for line in listed.stdout.splitlines() if line.strip())
        say(f"  {target.name} is up, with failed units: {failed}")
    # Docker may give it another MAC address after a restore; who remembers the old one waits in vain.
    run(["ip", "neigh", "flush", "dev", target.bridge], check=False)
    public.create(target)


def machine_lacks() -> list[tuple[str, str]]:
    """What container targets need of this machine and do not find: (what, how to mend it)."""
    lacks = []
    if os.geteuid() != 0:
        lacks.append(("root, for networks of the lab's own", "run it as root"))
    if not Path("/dev/net/tun").exists():
        lacks.append(("/dev/net/tun, for tailscale in containers", "modprobe tun"))
    if cgroup_mode(CGROUP) == "legacy":
        lacks.append(("control groups v2", "boot with systemd.unified_cgroup_hierarchy=1"))
    return lacks
