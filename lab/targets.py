"""One set of verbs for both kinds of targets. `lab.vm` is imported only when a VM is asked for."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Protocol

from lab import container, images
from lab.process import LabError
from lab.state import Run, Target

KINDS = ("container", "vm")
VM_NAMES = {"trixie": "v13", "bookworm": "v12"}
# It becomes a host name, a node of the tailnet and a part of a namespace's name.
_NAME = re.compile(r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$")


class Kind(Protocol):
    """What a kind of target can do; its module says how."""

    def create(self, run_: Run, distro: str, name: str) -> Target: ...

    def start(self, run_: Run, target: Target) -> Target: ...

    def destroy(self, run_: Run, target: Target) -> None: ...

    def restart(self, run_: Run, target: Target) -> None: ...

    def snapshot(self, run_: Run, target: Target) -> None: ...

    def restore(self, run_: Run, target: Target) -> None: ...


def of(kind: str) -> Kind:
    """The module of that kind of target."""
    if kind == "container":
        return container
    from lab import vm

    return vm


def name_of(kind: str, distro: str) -> str:
    """The usual name of a target of that kind with that Debian."""
    if distro not in images.DISTROS:
        raise LabError(f"No target with {distro!r}.", hint=f"It is one of: {', '.join(images.DISTROS)}.")
    return container.NAMES[distro] if kind == "container" else VM_NAMES[distro]


def create(run_: Run, kind: str, distro: str, name: str) -> Target:
    """Boot a blank target. One of that name that is there is taken away first. Raises LabError."""
    if not _NAME.match(name):
        raise LabError(f"Target name {name!r}: lower-case letters, digits and dashes, 32 at most.")
    return of(kind).create(run_, distro, name)


def start(run_: Run, target: Target) -> Target:
    """Start a target that is down."""
    return of(target.kind).start(run_, target)


def destroy(run_: Run, target: Target) -> None:
    """Take a target away with all that is its own."""
    of(target.kind).destroy(run_, target)


def restart(run_: Run, target: Target) -> None:
    """Reboot a target, as hard as a host's reboot is."""
    of(target.kind).restart(run_, target)


def snapshot(run_: Run, target: Target) -> None:
    """Keep the target as it is now. One snapshot, the newest."""
    of(target.kind).snapshot(run_, target)


def restore(run_: Run, target: Target) -> None:
    """Bring the target back to its snapshot."""
    of(target.kind).restore(run_, target)


def state(run_: Run, target: Target) -> str:
    """creating, running, stopped, failed or gone."""
    if target.state == "creating":
        return target.state
    if target.kind == "container":
        return container.state(run_, target)
    from lab import vm

    return vm.state(target)


def execute(
    run_: Run, target: Target, command: Sequence[str], *, check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command in the target as root, past its sshd and its firewall; `timeout` in seconds."""
    if target.kind == "container":
        return container.execute(run_, target, command, check=check, timeout=timeout)
    from lab import vm

    return vm.execute(target, command, check=check, timeout=timeout)
