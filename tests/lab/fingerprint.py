"""Whether two hosts that were told the same are the same: everything `hoststate` finds, compared."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import container
from lab.state import Run, Target
from lab.tailnet import Node, Tailnet
from tests.lab import hoststate
from tests.lab.story import Hosts

TIMEOUT_S = 120
# What pyinfra prints of a difference is enough to find it; the whole is in the report.
SHOWN = 12


@dataclass(frozen=True)
class Fingerprint:
    """A host's state, without what is by chance (addresses)."""

    facts: Mapping[str, Mapping[str, str]]
    """{area: {name: text}}, such as {"unit": {"ssh.service is": "enabled"}}."""
    due: tuple[str, ...]
    """Restarts and reloads that wait, a sentence each."""


def take(run: Run, target: Target) -> Fingerprint:
    """Read the state of a container target now, past its sshd. Raises LabError."""
    done = container.execute(
        run, target, ["python3", "-I", "-c", _source()], timeout=TIMEOUT_S, input=_asked(_nodes(run, target))
    )
    return _found(done.stdout, _nodes(run, target))


def through(hosts: Hosts, name: str) -> Fingerprint:
    """Read the state of any target by the way that is open: a VM's own channel is too narrow for it."""
    nodes = _nodes(hosts.lab.run, hosts.lab.target(name))
    told = shlex.quote(_asked(nodes))
    command = f"printf %s {told} | python3 -I -c {shlex.quote(_source())}"
    return _found(hosts.ssh(name, command).ok().out, nodes)


def _nodes(run: Run, target: Target) -> list[Node]:
    return [node for node in Tailnet.attach(run.directory).nodes() if node.hostname == target.name]


def _source() -> str:
    return Path(hoststate.__file__).read_text()


def _asked(nodes: Sequence[Node]) -> str:
    pairs = [
        [address, f"TAILNET{'6' if ':' in address else '4'}"] for node in nodes for address in node.addresses
    ]
    return json.dumps({"replace": pairs})


def _found(said: str, nodes: Sequence[Node]) -> Fingerprint:
    document = json.loads(said)
    # As the control server has it: a join that was begun twice must not leave two nodes.
    document["facts"]["tailscale"]["nodes of that name"] = " ".join(sorted(node.name for node in nodes))
    return Fingerprint(document["facts"], tuple(document["due"]))


def differences(wanted: Fingerprint, found: Fingerprint) -> list[str]:
    """In what `found` is not as `wanted`, and what waits there for a restart; a line each."""
    lines = [f"due: {sentence}" for sentence in found.due]
    for area in sorted(wanted.facts.keys() | found.facts.keys()):
        old, new = wanted.facts.get(area, {}), found.facts.get(area, {})
        lines += [f"{area} {name}: missing" for name in sorted(old.keys() - new.keys())]
        added = sorted(new.keys() - old.keys())
        lines += [f"{area} {name}: is there, and should not: {_cut(new[name])}" for name in added]
        for name in sorted(old.keys() & new.keys()):
            if old[name] != new[name]:
                lines.append(f"{area} {name}: {_difference(old[name], new[name])}")
    return lines


def _difference(old: str, new: str) -> str:
    if "\n" not in old + new:
        return f"{_cut(new)}, not {_cut(old)}"
    changes = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    shown = [line for line in changes if not line.startswith(("---", "+++", "@@"))]
    return " / ".join(shown[:SHOWN]) + (" / ..." if len(shown) > SHOWN else "")


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:100]}..."
