"""pyinfra's own command line, run so that what became of every host is known.

    python -P -m control.converge INVENTORY DEPLOY [NAME...]

pyinfra ends with 0 after Ctrl-C and other runs that did not happen (docs/pyinfra-exit-codes.md). Here 0 means
that every chosen host converged, 1 that one did not (one line each says why), 130 that it was interrupted.
"""

from __future__ import annotations

# First, and then what patches the standard library.
from control import loading  # isort: skip
from pyinfra_cli.cli import cli  # type: ignore[import-untyped]  # isort: skip

import io
import logging
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import pyinfra
from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.api.output import set_echo, set_formatter
from pyinfra.api.state import State, StateStage
from pyinfra.context import ctx_state
from typing_extensions import override

from quietport.errors import INTERRUPTED

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_OF_HOST = re.compile(r"\[(?P<name>[^\]\s]+)\]\s+(?:nested\s+)?(?P<text>.*)", re.DOTALL)
# control/connector.py says it at the end, of what the host's guard put back.
_UNDONE = "undone: "
_REASON = re.compile(r"(?:refused|failed): ")


@dataclass(frozen=True)
class Outcome:
    """What became of one host: how many operations changed it, and why it did not converge."""

    name: str
    changed: int = 0
    reason: str | None = None


def host_and_text(record: logging.LogRecord) -> tuple[str, str] | None:
    """Whom a line of pyinfra's log is about, and what it says; None when it is about no host."""
    found = _OF_HOST.match(_COLOURS.sub("", record.getMessage()))
    return (found["name"], " ".join(found["text"].split())) if found else None


class Errors(logging.Handler):
    """What pyinfra's log says went wrong, by host."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.of: dict[str, list[str]] = {}

    @override
    def emit(self, record: logging.LogRecord) -> None:
        found = host_and_text(record)
        if found:
            self.of.setdefault(found[0], []).append(found[1])

    def reason(self, name: str) -> str:
        """The sentence that says most about why this host failed, or nothing."""
        texts = [text.removeprefix(f"{name}: ") for text in self.of.get(name, []) if text]
        undone = [text.removeprefix(_UNDONE) for text in texts if text.startswith(_UNDONE)]
        texts = [text for text in texts if not text.startswith(_UNDONE)]
        told = [text for text in texts if _REASON.match(text)]
        # pyinfra's own line after a failure names the count of its commands, and no reason.
        other = [text for text in texts if not text.startswith("Error: executed ")]
        # Not str.capitalize, which makes the rest lower-case: names of programs and of files are in it.
        sentences = [f"{text[:1].upper()}{text[1:]}" for text in undone]
        return " ".join([*(told or other or texts or [""])[-1:], *sentences])


def outcomes(state: State, errors: Errors) -> list[Outcome]:
    """What became of every chosen host, in the inventory's order."""
    chosen = [host for host in state.inventory if state.is_host_in_limit(host)]
    return [_outcome(state, host, errors) for host in chosen]


def _outcome(state: State, host: Host, errors: Errors) -> Outcome:
    metas = [(op_hash, state.ops[host][op_hash].operation_meta) for op_hash in host.op_hash_order]
    changed = sum(meta.is_complete() and meta.did_change() for _, meta in metas)
    undone = [op_hash for op_hash, meta in metas if not meta.did_succeed(_raise_if_not_complete=False)]
    if host not in state.activated_hosts:
        return Outcome(host.name, reason=errors.reason(host.name) or "it was not reached")
    if host in state.failed_hosts:
        reason = errors.reason(host.name) or "it failed"
        # pyinfra puts the deploy's name before the step's, which begins with it.
        names = sorted(state.op_meta[undone[0]].names) if undone and state.is_executing else [""]
        step = names[0].rpartition(" | ")[2]
        return Outcome(host.name, changed, f"{reason} (step: {step})" if step else reason)
    if undone or not metas or state.current_stage < StateStage.Disconnect:
        return Outcome(host.name, changed, "the run ended before it was through")
    return Outcome(host.name, changed)


def report(found: Iterable[Outcome]) -> list[str]:
    """The closing lines: one for each host."""
    return [
        f"quietport: {one.name} did not converge: {one.reason}"
        if one.reason is not None
        else f"quietport: {one.name} converged, {one.changed or 'no'} change{'' if one.changed == 1 else 's'}"
        for one in found
    ]


def main(inventory: str, deploy: str, *names: str) -> int:
    """Converge and tell. Returns the exit code."""
    errors = Errors()
    logger.addHandler(errors)
    code = run_pyinfra([inventory, deploy, "-y", *options(deploy, names)])
    state = current_state()
    if state is None:
        return code or 1
    found = outcomes(state, errors)
    for line in report(found):
        click.echo(line, err=True)
    return code or int(not found or any(one.reason is not None for one in found))


def options(deploy: str, names: Iterable[str]) -> list[str]:
    """pyinfra's options for these hosts, all without any."""
    limits = [word for name in names for word in ("--limit", name)]
    # Not the config.py of the directory it is called in.
    return ["--config", str(Path(deploy).parents[1] / "config.py"), *limits]


def current_state() -> State | None:
    """pyinfra's state, once there is an inventory in it."""
    state: State | None = ctx_state.get() if ctx_state.isset() else None  # type: ignore[no-untyped-call]
    return state if state is not None and state.initialised else None


def run_pyinfra(argv: Sequence[str]) -> int:
    """What pyinfra_cli.main.main does, but for Ctrl-C: INTERRUPTED then. Else pyinfra's exit code."""
    code = _run(argv)
    return INTERRUPTED if _stopped else code


def _run(argv: Sequence[str]) -> int:
    pyinfra.is_cli = True
    set_formatter(click.style)
    set_echo(click.echo)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, _interrupted)
    try:
        cli(argv, prog_name="pyinfra")
    except SystemExit as end:
        if isinstance(end.code, str):
            click.echo(end.code, err=True)
            return 1
        return end.code or 0
    return 0


# Whether Ctrl-C came: the SystemExit below may end in a greenlet that is being killed, and be lost with it.
_stopped: list[bool] = []


def _interrupted(*_: object) -> NoReturn:
    _stopped.append(True)
    click.echo("quietport: interrupted. What a host was told last may go on there; run again.", err=True)
    state = current_state()
    if state is not None:
        # Disconnecting needs places in the pool that waiting for the hosts' answers takes.
        state.pool.kill(block=False)
    sys.exit(INTERRUPTED)


def _arguments(argv: Sequence[str]) -> Sequence[str]:
    if len(argv) < 2:
        sys.exit(__doc__)
    return argv


loading.done()
if __name__ == "__main__":
    sys.exit(main(*_arguments(sys.argv[1:])))
