"""`python -m lab`: disposable targets, a tailnet to try things on, and a public side to look from."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab import bootstrap, doctor, evidence, hosts, images, public, targets
from lab.process import LabError, say, step
from lab.state import Run, Target, all_runs, current_run_id

SCHEMA = 1
# Seconds a public address has to answer before the tailnet is tried.
PUBLIC_PATIENCE = 1.0
SSH_PORT = 22


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    top.add_argument("--run", metavar="ID", help="the lab run (default: QUIETPORT_LAB_RUN, else `default`)")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("up", help="have a target, with tailnet and public side around it")
    _which(verb)
    verb.add_argument("--name", help="the target's name (containers; a run has one VM of each Debian)")
    verb.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME[,NAME...]",
        help="a host that is not blank, with all of these; once more for one more target",
    )
    verb.add_argument("--fresh", action="store_true", help="make the target anew when it is there")
    verbs.add_parser("variants", help="the kinds of hosts that are not blank")
    verb = verbs.add_parser("down", help="remove what the run made, and nothing else")
    verb.add_argument("--all", action="store_true", help="every run, not only this one")
    verb = verbs.add_parser("status", help="what there is")
    verb.add_argument("--json", action="store_true")
    verb = verbs.add_parser("ssh", help="log in to a target, by the way that is open")
    verb.add_argument("name")
    verb.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    verb = verbs.add_parser("probe", help="scan a target's TCP ports from its public side")
    verb.add_argument("name")
    verb.add_argument("--ports", default=public.ALL_PORTS, help="such as 22,80,8000-8100 (default: all)")
    verb.add_argument("--json", action="store_true")
    for word, what in (
        ("snapshot", "keep a target as it is now"),
        ("restore", "bring a target back to its snapshot"),
        ("logs", "collect a target's journal and state into the run's logs"),
    ):
        verbs.add_parser(word, help=what).add_argument("name")
    verb = verbs.add_parser("restart", help="reboot targets, several at the same time")
    verb.add_argument("names", nargs="+", metavar="NAME")
    verb = verbs.add_parser("doctor", help="what this machine lacks, and the command that mends it")
    verb.add_argument("--target", choices=targets.KINDS, default="container")
    verb.add_argument("--json", action="store_true")
    verb = verbs.add_parser("demo", help="a blank host becomes private, before your eyes")
    _which(verb)
    verbs.add_parser("e2e", help="the end-to-end tests, on every kind of target this machine can have")
    verbs.add_parser("hosts", help="the run's hosts file, for QUIETPORT_HOSTS")
    verb = verbs.add_parser("guard", help="exit code 0 when a hosts file names a lab's targets alone")
    verb.add_argument("file", type=Path)
    verb = verbs.add_parser("carry", help="a ProxyCommand: standard input and output to a target's port")
    verb.add_argument("name")
    verb.add_argument("port", type=int)
    return top


def _which(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--target", choices=targets.KINDS, default="container")
    verb.add_argument("--distro", choices=images.DISTROS, default="trixie")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit code 0 when it went well, 1 with a sentence when not, 2 for a wrong command line."""
    # Programs of the lab live in sbin, which is not on every user's PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *bootstrap.SBIN])
    arguments = parser().parse_args(argv)
    try:
        run_ = Run(arguments.run or current_run_id())
        return _act(arguments, run_)
    except LabError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted. `python -m lab down` removes what there is.")
        return 130


def _act(arguments: argparse.Namespace, run_: Run) -> int:
    verb: str = arguments.verb
    if verb == "up":
        return _up(run_, arguments)
    if verb == "variants":
        return _variants()
    if verb == "down":
        return _down(all_runs() if arguments.all else [run_])
    if verb == "status":
        return _status(run_, as_json=arguments.json)
    if verb == "doctor":
        findings = doctor.examine(arguments.target)
        print(doctor.report(findings, as_json=arguments.json))
        return 0 if all(finding.ok for finding in findings) else 1
    if verb == "demo":
        from lab import demo

        return demo.main(run_, arguments.target, arguments.distro)
    if verb == "e2e":
        from lab import e2e

        return e2e.main()
    if verb == "hosts":
        hosts.guard(run_.hosts_file)
        print(run_.hosts_file)
        return 0
    if verb == "guard":
        hosts.guard(arguments.file)
        return 0
    if verb == "restart":
        return _restart(run_, [run_.target(name) for name in arguments.names])
    return _act_on(arguments, run_, run_.target(arguments.name))


def _act_on(arguments: argparse.Namespace, run_: Run, target: Target) -> int:
    from lab import up

    verb: str = arguments.verb
    if verb == "ssh":
        return _ssh(run_, target, arguments.command)
    if verb == "carry":
        return _carry(run_, target, arguments.port)
    if verb == "probe":
        return _probe(run_, target, arguments.ports, as_json=arguments.json)
    if verb == "snapshot":
        up.snapshot(run_, target)
    elif verb == "restore":
        up.restore(run_, target)
    else:
        print(evidence.collect(run_, target))
    return 0


def _up(run_: Run, arguments: argparse.Namespace) -> int:
    from lab import up

    asked = [tuple(text.split(",")) for text in arguments.variant] or [()]
    if arguments.name and len(asked) > 1:
        raise LabError("One --name for several targets.", hint="Name them one at a time.")
    kind, distro, name = arguments.target, arguments.distro, arguments.name
    wanted = [up.Wanted.of(kind, distro, name=name, variants=names) for names in asked]
    bootstrap.ensure_programs(vm=kind == "vm")
    with step(f"lab run {run_.id!r}"):
        found = up.up(run_, wanted, fresh=arguments.fresh)
    for target in found:
        where = f"{target.public_ip} and {target.public_ip6}"
        say(f"\n{target.name} is up: Debian {target.distro}, {target.kind}, {where}.")
        say(f"  log in:      python -m lab --run {run_.id} ssh {target.name}")
    say(f"  hosts file:  {run_.hosts_file}")
    say(f"  remove all:  python -m lab --run {run_.id} down")
    return 0


def _restart(run_: Run, found: Sequence[Target]) -> int:
    names = ", ".join(target.name for target in found)
    with run_.lock(), step(f"restart {names}"), ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda target: targets.restart(run_, target), found))
    return 0


def _variants() -> int:
    from lab.variants import ALL

    for variant in ALL.values():
        print(f"{variant.name:<22}{variant.what}")
    return 0


def _down(runs: Sequence[Run]) -> int:
    from lab import up

    for run_ in runs:
        with step(f"take down lab run {run_.id!r}"):
            up.down(run_)
    return 0


def status(run_: Run) -> dict[str, Any]:
    """What `status --json` prints.

    {"schema": 1, "run_id", "login_server", "ssh_config",
     "targets": [{"name", "kind", "distro", "public_ip", "tailnet_ip", "state"}]}: `login_server` is null
    when the tailnet is not up, `tailnet_ip` when the target is not on it.
    """
    from lab import up
    from lab.tailnet import Tailnet

    tailnet: Tailnet | None = None
    addresses: dict[str, str] = {}
    # A tailnet that is down is a state to report, not a failure to report it.
    with contextlib.suppress(LabError):
        found = Tailnet.attach(run_.directory)
        if found.running:
            tailnet = found
            addresses = {node.hostname: node.addresses[0] for node in found.nodes() if node.addresses}
            up.write_ssh_config(run_, found)
    described = []
    for target in run_.read().targets.values():
        described.append(
            {
                "name": target.name,
                "kind": target.kind,
                "distro": target.distro,
                "public_ip": target.public_ip,
                "tailnet_ip": addresses.get(target.name),
                "state": targets.state(run_, target),
            }
        )
    return {
        "schema": SCHEMA,
        "run_id": run_.id,
        "login_server": tailnet.login_server if tailnet else None,
        "ssh_config": str(run_.ssh_config),
        "targets": described,
    }


def _status(run_: Run, *, as_json: bool) -> int:
    found = status(run_)
    if as_json:
        print(json.dumps(found))
        return 0
    print(f"run           {found['run_id']}")
    print(f"login server  {found['login_server'] or 'not up'}")
    print(f"hosts file    {run_.hosts_file}")
    print(f"ssh config    {found['ssh_config']}")
    for target in found["targets"]:
        tailnet_ip = target["tailnet_ip"] or "not on the tailnet"
        print(
            f"{target['name']:<14}{target['state']:<9} {target['kind']:<10} {target['distro']:<9} "
            f"{target['public_ip']:<15} {tailnet_ip}"
        )
    return 0


def _ssh(run_: Run, target: Target, command: Sequence[str]) -> int:
    """Become ssh; its exit code is the command's."""
    words = list(command[1:] if command[:1] == ["--"] else command)
    sys.stdout.flush()
    os.execvp("ssh", ["ssh", "-F", str(run_.ssh_config), target.name, *(["--", *words] if words else [])])  # noqa: S606


def _carry(run_: Run, target: Target, port: int) -> int:
    """Carry bytes to the target: over the public address while that answers, else through the tailnet."""
    try:
        link = socket.create_connection((target.public_ip, port), timeout=PUBLIC_PATIENCE)
    except OSError:
        return _carry_by_tailnet(run_, target, port)
    link.settimeout(None)

    def outward() -> None:
        while block := os.read(0, 65536):
            link.sendall(block)
        link.shutdown(socket.SHUT_WR)

    threading.Thread(target=outward, daemon=True).start()
    # A reset is the end as well: ssh says what that means.
    with contextlib.suppress(ConnectionResetError):
        while block := link.recv(65536):
            os.write(1, block)
    return 0


def _carry_by_tailnet(run_: Run, target: Target, port: int) -> int:
    import shlex

    from lab.tailnet import Tailnet

    tailnet = Tailnet.attach(run_.directory)
    nodes = sorted((node for node in tailnet.nodes() if node.hostname == target.name), key=lambda n: n.online)
    if not nodes:
        raise LabError(
            f"{target.name} does not answer at {target.public_ip} port {port}, and is not on the tailnet.",
            hint=f"`python -m lab --run {run_.id} logs {target.name}` looks inside.",
        )
    words = shlex.split(tailnet.proxy_command)
    filled = {"%h": nodes[-1].addresses[0], "%p": str(port), "%%": "%"}
    argv = [filled.get(word, word.replace("%%", "%")) for word in words]
    os.execv(argv[0], argv)  # noqa: S606


def _probe(run_: Run, target: Target, ports: str, *, as_json: bool) -> int:
    """Scan public and container addresses.

    JSON: {"schema": 1, "target", "addresses": {ADDRESS: ANSWER}}, where ANSWER is
    {"open": [PORT], "refused", "unreachable", "silent"}; the last three count ports.
    """
    addresses = [target.public_ip, target.public_ip6, *evidence.container_addresses(run_, target)]
    seen = public.scan(target, addresses, ports=ports)
    if as_json:
        found = {address: asdict(answer) for address, answer in seen.items()}
        print(json.dumps({"schema": SCHEMA, "target": target.name, "addresses": found}))
        return 0
    for address, answer in seen.items():
        words = ", ".join(map(str, answer.open)) or "nothing"
        rest = f"{answer.refused} refused, {answer.silent} silent, {answer.unreachable} unreachable"
        print(f"{address:<28} open: {words}   ({rest})")
    return 0
