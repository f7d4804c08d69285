"""A blank host becomes private, with the commands a user types, shown and run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from lab import bootstrap, public, targets, up
from lab.process import LabError, say, step
from lab.state import Run, Target
from lab.tailnet import Tailnet

DEPLOY = "deploys/vps.py"
BIN = bootstrap.VENV / "bin"


def main(run_: Run, kind: str, distro: str) -> int:
    """Show the whole way on a blank target. Raises LabError at the first step that is not as promised."""
    began = time.monotonic()
    bootstrap.ensure_programs(vm=kind == "vm")
    with step(f"lab run {run_.id!r}: a blank Debian host ({distro}, {kind}), and a tailnet"):
        [target] = up.up(run_, [up.Wanted.of(kind, distro)], fresh=True)
    _before(target)
    # The demo is about this target: others of the run stay as they are.
    limit = ["--limit", target.name]
    _show(
        run_,
        "What would change, with the content of files",
        ["pyinfra", "inventory", DEPLOY, "--dry", "--diff", *limit],
    )
    _show(run_, "Make it so", ["pyinfra", "inventory", DEPLOY, "-y", *limit])
    _show(run_, "Is the host what it should be?", ["pytest", "tests/spec", *_only(target)])
    _second(run_, target)
    _picture(run_, target)
    say(f"\nThe demo took {time.monotonic() - began:.0f} s.")
    return 0


def _only(target: Target) -> list[str]:
    return [f"--hosts={target.name}"]


def _before(target: Target) -> None:
    seen = public.scan(target, ports="1-1024")
    for address, ports in seen.items():
        say(f"  from the public side, {address}: open {', '.join(map(str, ports.open)) or 'nothing'}")
        if not ports.open:
            raise LabError(f"{target.name} shows no open port at {address}, and a blank host does.")


def _environment(run_: Run) -> dict[str, str]:
    path = os.pathsep.join((str(BIN), os.environ.get("PATH", "")))
    return {**os.environ, "QUIETPORT_HOSTS": str(run_.hosts_file), "PATH": path}


def _show(run_: Run, why: str, argv: Sequence[str]) -> None:
    """Print a command and run it before the reader's eyes. Raises LabError when it fails."""
    say(f"\n# {why}\n$ {shlex.join(argv)}")
    began = time.monotonic()
    done = subprocess.run(argv, env=_environment(run_), cwd=bootstrap.PROJECT, check=False)
    say(f"  {time.monotonic() - began:.1f} s")
    if done.returncode != 0:
        raise LabError(
            f"{shlex.join(argv)}: exit code {done.returncode}.",
            hint=f"The target is kept: python -m lab --run {run_.id} logs, ssh, down.",
        )


def _second(run_: Run, target: Target) -> None:
    """Converge again and count: the same command on the same host changes nothing."""
    argv = ["pyinfra", "inventory", DEPLOY, "-y", "--json", "--limit", target.name]
    say(f"\n# The same again: nothing is left to change\n$ {shlex.join(argv)}")
    began = time.monotonic()
    done = subprocess.run(
        argv, env=_environment(run_), cwd=bootstrap.PROJECT, check=False, stdout=subprocess.PIPE, text=True
    )
    operations, changed = count(done.stdout)
    say(f"  {time.monotonic() - began:.1f} s: {operations} operations, {len(changed)} changes")
    if done.returncode != 0:
        raise LabError(f"The second converge ended with exit code {done.returncode}.")
    if operations == 0:
        raise LabError("The second converge ran no operation at all.")
    if changed:
        raise LabError(f"The second converge changed: {', '.join(changed)}.")


def count(text: str) -> tuple[int, list[str]]:
    """From pyinfra's --json: how many operations ran, and the names of those that changed something.

    Raises LabError when it is not that, or an operation failed.
    """
    try:
        operations = json.loads(text)["results"]["operations"]
        failed = [operation["name"] for operation in operations if operation["error"]]
        changed = [operation["name"] for operation in operations if operation["success"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"pyinfra's result cannot be read: {error!r}.") from error
    if failed:
        raise LabError(f"Failed: {', '.join(failed)}.")
    return len(operations), changed


def _picture(run_: Run, target: Target) -> None:
    """What listens for whom, and what the reader does next."""
    say(f"\n# {target.name} now")
    for address, ports in public.scan(target).items():
        say(f"  from the public side, {address}: {', '.join(map(str, ports.open)) or 'nothing'} is open")
        if ports.open:
            raise LabError(f"{target.name} is not private: {address} has open ports {ports.open}.")
    listeners = targets.execute(run_, target, ["quietport", "ports", "--json"], check=False).stdout
    for line in listening(listeners):
        say(f"  {line}")
    tailnet = Tailnet.attach(run_.directory)
    address = next((n.addresses[0] for n in tailnet.nodes() if n.name == target.name), "its tailnet address")
    say(
        f"""
# Log in, through the tailnet
  python -m lab --run {run_.id} ssh {target.name}
  ssh -F {run_.ssh_config} {address}

# Try things on it
  . .venv/bin/activate
  {_typed(run_)}pyinfra inventory {DEPLOY} --dry
  python -m lab --run {run_.id} down        removes all of this

# Your own VPS
  quietport example > hosts.toml            every key, explained; fill in your host
  pyinfra inventory {DEPLOY} --dry --diff
  pyinfra inventory {DEPLOY} -y"""
    )


def _typed(run_: Run) -> str:
    """What must precede a command so that it means this lab, where hosts.toml or other labs are there."""
    from control.labs import running_lab_files

    alone = running_lab_files() == [run_.hosts_file] and not (Path.cwd() / "hosts.toml").is_file()
    return "" if alone else f"QUIETPORT_HOSTS={run_.hosts_file} "


def listening(text: str) -> list[str]:
    """Lines about listeners, grouped by who can reach them, from `quietport ports --json`."""
    try:
        listeners = json.loads(text)["listeners"]
    except (ValueError, KeyError, TypeError):
        return ["its listeners could not be read: `ss -lntup` on the host shows them"]
    groups: dict[str, list[str]] = {"public": [], "tailnet": [], "private": [], "loopback": []}
    for listener in listeners:
        where = f"{listener['protocol']}/{listener['port']} {listener.get('process') or '?'}"
        groups.setdefault(listener["exposure"], []).append(where)
    titles = {
        "public": "on public addresses (WireGuard answers nobody it does not know)",
        "tailnet": "for the tailnet",
        "private": "for its own containers",
        "loopback": "on loopback",
    }
    return [
        f"listens {titles.get(name, name)}: {', '.join(sorted(set(found))) or 'nothing'}"
        for name, found in groups.items()
    ]
