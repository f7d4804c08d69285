"""pyinfra's own dry run, in which every operation also tells why its change is due (operations/notes.py).

    python -P -m control.dryrun plan|drift|json INVENTORY DEPLOY [NAME...]

`pyinfra --dry` ends with 0 whatever it found, and knows of a change only that there is one. What is printed
and what the exit codes mean is in control/plan.py; 130 is Ctrl-C.
"""

from __future__ import annotations

# First: this patches the standard library.
from control.converge import Errors, current_state, host_and_text, options, run_pyinfra  # isort: skip

import contextlib
import io
import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import click
from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.api.state import State
from typing_extensions import override

from control.plan import ERROR, Change, Form, HostPlan, exit_code, rendered
from control.reach import ABOUT
from operations import notes
from operations.notes import CERTAIN, UNKNOWN, Note, Notes
from quietport.cli import reader_left
from quietport.errors import INTERRUPTED

_LATER = re.compile(r" \[content known after [^\]]*\]$")
NOT_OURS = "the operation does not say what it finds"
CONDITION = "its condition is read when it is its turn"


class Quiet(logging.Filter):
    """Keeps pyinfra's log off the terminal and notes what went wrong; an error about no host is shown."""

    def __init__(self, errors: Errors) -> None:
        super().__init__()
        self._errors = errors
        # {host: [sentence]}: such as a way to it that did not answer.
        self.remarks: dict[str, list[str]] = {}

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            if name := getattr(record, ABOUT, None):
                self.remarks.setdefault(name, []).append(record.getMessage().removeprefix(f"{name}: "))
            return False
        self._errors.emit(record)
        return host_and_text(record) is None


def main(form: str, inventory: str, deploy: str, *names: str) -> int:
    """Make the plan and print it. Returns the exit code."""
    errors = Errors()
    quiet = Quiet(errors)
    logger.addFilter(quiet)
    collected = notes.collect()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run_pyinfra([inventory, deploy, "--dry", "--json", *options(deploy, names)])
    state = current_state()
    if state is None or code == INTERRUPTED:
        return code or ERROR
    for name, sentences in quiet.remarks.items():
        collected.remarks.setdefault(name, [])[:0] = sentences
    found = plans(state, _operations(said.getvalue()), collected, errors)
    try:
        click.echo(rendered(found, form=cast(Form, form)), nl=False)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()
    return exit_code(found)


def _operations(said: str) -> list[Mapping[str, Any]] | None:
    """pyinfra's plan, in its order; None when the dry run broke off before it had one."""
    try:
        operations: list[Mapping[str, Any]] = json.loads(said)["plan"]
    except (ValueError, LookupError, TypeError):
        return None
    return operations


def plans(
    state: State, operations: Sequence[Mapping[str, Any]] | None, collected: Notes, errors: Errors
) -> list[HostPlan]:
    """The plan of every chosen host, in the inventory's order."""
    chosen = [host for host in state.inventory if state.is_host_in_limit(host)]
    return [_plan(state, host, operations, collected, errors) for host in chosen]


def _plan(
    state: State,
    host: Host,
    operations: Sequence[Mapping[str, Any]] | None,
    collected: Notes,
    errors: Errors,
) -> HostPlan:
    remarks = tuple(collected.remarks.get(host.name, ()))
    if host not in state.activated_hosts:
        return HostPlan(host.name, error=errors.reason(host.name) or "it was not reached")
    if host in state.failed_hosts:
        return HostPlan(host.name, remarks=remarks, error=errors.reason(host.name) or "it failed")
    if not operations:
        return HostPlan(host.name, remarks=remarks, error="the dry run ended before it was through")
    changes, refused = _changes(operations, host.name, collected.of.get(host.name, {}))
    error = None if refused is None else f"would be refused: {refused}"
    return HostPlan(host.name, changes=changes, remarks=remarks, error=error)


def _changes(
    operations: Iterable[Mapping[str, Any]], name: str, noted: Mapping[str, Note]
) -> tuple[tuple[Change, ...], str | None]:
    """What would be done to the host until its end or a refusal, and the refusal."""
    found: list[Change] = []
    for operation in operations:
        conditional = name in operation["hosts_with_conditional_change"]
        if not conditional and name not in operation["hosts_with_change"]:
            continue
        note = noted.get(operation["op_hash"])
        if note is not None and note.refused:
            return tuple(found), note.refused
        if note is None or not note.leaves_host:
            found.append(_change(operation, note, conditional=conditional))
    return tuple(found), None


def _change(operation: Mapping[str, Any], note: Note | None, *, conditional: bool) -> Change:
    # pyinfra puts the deploy's name before the step's, which begins with it.
    name = (note.name if note else "") or operation["name"].rpartition(" | ")[2]
    what = _LATER.sub("", name)
    if note is None:
        # Such as server.shell, which pyinfra shows as a change on every run.
        return Change(what, UNKNOWN, CONDITION if conditional else NOT_OURS)
    if conditional:
        return Change(what, UNKNOWN, CONDITION, tuple(note.reasons), dict(note.differences))
    on = None if note.certainty == CERTAIN else note.on
    return Change(what, note.certainty, on, tuple(note.reasons), dict(note.differences))


def _arguments(argv: Sequence[str]) -> Sequence[str]:
    if len(argv) < 3 or argv[0] not in ("plan", "drift", "json"):
        sys.exit(__doc__)
    return argv


if __name__ == "__main__":
    sys.exit(main(*_arguments(sys.argv[1:])))
