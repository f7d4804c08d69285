"""`quietport` on the operator's side. Exit codes: 0 fine, 1 error, 2 usage, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from pyinfra.api.exceptions import PyinfraError

from control import apply, example, ports, reach, state
from control.errors import SettingsError
from control.settings import fleet, nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Errors are one sentence on standard error."""
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        # Now, not when the interpreter ends: there nobody can catch a reader that has left.
        sys.stdout.flush()
        return code
    except PyinfraError as error:
        print(f"quietport: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has what it wanted (`quietport example | head`); the interpreter must not complain
        # (https://docs.python.org/3/library/signal.html#note-on-sigpipe).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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


if __name__ == "__main__":
    sys.exit(main())
