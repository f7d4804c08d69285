"""`quietport` on the operator's side. Exit codes: 0 fine, 1 error, 2 usage, 130 interrupted.

`plan` and `drift` end with 2 when changes are pending, and with 1 for a usage that is wrong.
"""

from __future__ import annotations

# First: the others take a while.
from control import loading  # isort: skip

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from pyinfra.api.exceptions import PyinfraError

from control import apply, doctor, example, plan, ports, reach, state, verify
from control.errors import SettingsError
from control.settings import fleet, nearest
from quietport.cli import reader_left
from quietport.errors import INTERRUPTED

PLANNING = {
    "plan": "what a converge would change; ends with 0 for nothing, 2 for changes, 1 for an error",
    "drift": "the same in brief, for CI and a timer",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Errors are one sentence on standard error."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    # When the reader leaves before the answer is known: an example is one all the same.
    code = 0 if options.run is _example else 1
    try:
        code = int(options.run(options))
        # Now, not when the interpreter ends: there nobody can catch a reader that has left.
        sys.stdout.flush()
        return code
    except PyinfraError as error:
        print(f"quietport: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        reader_left()
        return code


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    try:
        return _parser().parse_args(arguments)
    except SystemExit as end:
        # For a script that asks for drift, 2 is an answer.
        if end.code == 2 and arguments and arguments[0] in PLANNING:
            sys.exit(1)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quietport", description="The operator's side of hosts that only their tailnet can see."
    )
    parser.add_argument("--version", action="version", version=f"quietport {_version()}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    converge = verbs.add_parser(
        "apply", help="converge the hosts; ends with 0 only when every one of them did"
    )
    converge.add_argument("names", metavar="NAME", nargs="*", help="only these hosts")
    converge.set_defaults(run=_apply)
    asked = verbs.add_parser(
        "ports", help="what can be reached on the hosts, and whether that may be, by their own word"
    )
    asked.add_argument("names", metavar="NAME", nargs="*", help="only these hosts")
    asked.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    asked.set_defaults(run=_ports)
    examined = verbs.add_parser(
        "doctor", help="how the hosts are, by their own word and seen from outside of them"
    )
    examined.add_argument("names", metavar="NAME", nargs="*", help="only these hosts")
    examined.add_argument("--json", action="store_true", help="as JSON; its keys are in control/doctor.py")
    examined.set_defaults(run=_doctor)
    for verb, what in PLANNING.items():
        planning = verbs.add_parser(verb, help=what)
        planning.add_argument("names", metavar="NAME", nargs="*", help="only these hosts")
        planning.add_argument("--json", action="store_true", help="as JSON; its keys are in control/plan.py")
        planning.set_defaults(run=_plan, form=verb)
    verifying = verbs.add_parser("verify", help="read the hosts with the specs; ends with 0 when all hold")
    verifying.add_argument("names", metavar="NAME", nargs="*", help="only these hosts")
    verifying.add_argument("--junit", metavar="FILE", help="write a JUnit report as well")
    verifying.set_defaults(run=_verify)
    forget = verbs.add_parser(
        "forget", help="forget a host's pinned key and tailnet address, as after a reinstall"
    )
    forget.add_argument("name", metavar="NAME")
    forget.set_defaults(run=_forget)
    config = verbs.add_parser(
        "ssh-config", help="write an OpenSSH configuration for the hosts and print its path"
    )
    config.add_argument("names", metavar="NAME", nargs="*", help="only these hosts")
    config.set_defaults(run=_ssh_config)
    shown = verbs.add_parser("example", help="print a hosts.toml with every key explained")
    shown.set_defaults(run=_example)
    return parser


def _apply(options: argparse.Namespace) -> int:
    apply.run(options.names)


def _ports(options: argparse.Namespace) -> int:
    return ports.run(options.names, as_json=options.json)


def _doctor(options: argparse.Namespace) -> int:
    return doctor.run(options.names, as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    plan.run(options.names, form="json" if options.json else options.form)


def _verify(options: argparse.Namespace) -> int:
    verify.run(options.names, junit=options.junit)


def _forget(options: argparse.Namespace) -> int:
    # A host may have left the hosts file and still be remembered.
    known = sorted({*fleet().hosts, *state.remembered()})
    if options.name not in known:
        raise SettingsError(f"{fleet().file}: no host called {options.name!r}.{nearest(options.name, known)}")
    if state.forget(options.name):
        print(f"{options.name}: forgot its pinned host key and its tailnet addresses.")
    else:
        print(f"{options.name}: nothing was remembered.")
    return 0


def _ssh_config(options: argparse.Namespace) -> int:
    print(reach.ssh_config(options.names))
    return 0


def _example(_: argparse.Namespace) -> int:
    sys.stdout.write(example.text())
    return 0


def _version() -> str:
    try:
        return version("quietport")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "of this checkout"


loading.done()
if __name__ == "__main__":
    sys.exit(main())
