"""One set of verbs for both kinds of targets. `lab.vm` is imported only when a VM is asked for."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from lab import container, engine, images
from lab.engine import Engine
from lab.process import LabError
from lab.state import Run, Target

KINDS = ("container", "vm")
VM_NAMES = {"trixie": "v13", "bookworm": "v12"}


def name_of(kind: str, distro: str) -> str:
    """The name of the run's target of that kind with that Debian."""
    if distro not in images.DISTROS:
        raise LabError(f"No target with {distro!r}.", hint=f"It is one of: {', '.join(images.DISTROS)}.")
    return container.NAMES[distro] if kind == "container" else VM_NAMES[distro]


def create(run_: Run, kind: str, distro: str) -> Target:
    """Boot a blank target. One of that name that is there is taken away first."""
    if kind == "container":
        return container.create(run_, engine.acquire(run_), distro)
    from lab import vm

    return vm.create(run_, distro)


def start(run_: Run, target: Target) -> Target:
    """Start a target that is down."""
    if target.kind == "container":
        return container.start(run_, engine.acquire(run_), target)
    from lab import vm

    return vm.start(run_, target)


def destroy(run_: Run, target: Target) -> None:
    """Take a target away with all that is its own."""
    if target.kind == "container":
        container.destroy(run_, engine.attached(run_), target)
        return
    from lab import vm

    vm.destroy(run_, target)


def restart(run_: Run, target: Target) -> None:
    """Reboot a target, as hard as a host's reboot is."""
    if target.kind == "container":
        container.restart(run_, _engine(run_), target)
        return
    from lab import vm

    vm.restart(run_, target)


def snapshot(run_: Run, target: Target) -> None:
    """Keep the target as it is now. One snapshot, the newest."""
    if target.kind == "container":
        container.snapshot(run_, _engine(run_), target)
        return
    from lab import vm

    vm.snapshot(run_, target)


def restore(run_: Run, target: Target) -> None:
    """Bring the target back to its snapshot."""
    if target.kind == "container":
        container.restore(run_, _engine(run_), target)
        return
    from lab import vm

    vm.restore(run_, target)


def state(run_: Run, target: Target) -> str:
    """creating, running, stopped, failed or gone."""
    if target.state == "creating":
        return target.state
    if target.kind == "container":
        return container.state(engine.attached(run_), target)
    from lab import vm

    return vm.state(target)


def execute(
    run_: Run, target: Target, command: Sequence[str], *, check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command in the target as root, past its sshd and its firewall; `timeout` in seconds."""
    if target.kind == "container":
        return container.execute(_engine(run_), target, command, check=check, timeout=timeout)
    from lab import vm

    return vm.execute(target, command, check=check, timeout=timeout)


def _engine(run_: Run) -> Engine:
    found = engine.attached(run_)
    if found is None:
        raise LabError(
            f"The Docker daemon of run {run_.id!r} does not answer.", hint="`python -m lab up` mends it."
        )
    return found
