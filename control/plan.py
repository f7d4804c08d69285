"""`quietport plan` and `quietport drift`: what a converge would change, with an exit code that says whether.

0: nothing, 2: changes are pending, 1: a host could not be asked, or would be refused. With --json:

    {"schema": 1, "hosts": [{"name": "vps1", "state": "as declared | changes pending | error",
     "error": null, "remarks": [SENTENCE], "changes": [{"what": NAME, "certainty": "certain | depends on an
     earlier change | cannot be known", "on": null, "reasons": [PHRASE],
     "differences": [{"path": PATH, "text": UNIFIED}]}]}]}

`on` is the earlier change, or why it cannot be known. `error` is a sentence. No secret is in any of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import click

from control import apply
from control.secret import masked
from quietport.errors import printable

SCHEMA = 1
FINE, ERROR, PENDING = 0, 1, 2
Form = Literal["plan", "drift", "json"]
AS_DECLARED, CHANGES, FAILED = "as declared", "changes pending", "error"


@dataclass(frozen=True)
class Change:
    """One change a converge would make: the operation's name, how sure it is, and what is not as declared."""

    what: str
    certainty: str
    on: str | None = None
    reasons: tuple[str, ...] = ()
    differences: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HostPlan:
    """What a converge would do to one host. `error`: why that is not known, or would not go through."""

    name: str
    changes: tuple[Change, ...] = ()
    remarks: tuple[str, ...] = ()
    error: str | None = None

    @property
    def state(self) -> str:
        """One word for all of it."""
        if self.error is not None:
            return FAILED
        return CHANGES if self.changes else AS_DECLARED


def run(names: Sequence[str], *, form: Form, doing: str = "planning") -> NoReturn:
    """Become the dry run of these hosts, all by default. The rest is told by control.dryrun.

    Raises SettingsError for a hosts file that cannot be used or an unknown name, QuietportError without the
    deploys of a checkout.
    """
    chosen = apply.chosen_of(names)
    root = apply.checkout()
    argv = ["control.dryrun", form, str(root / apply.INVENTORY), str(root / apply.DEPLOY), *chosen]
    apply.become(argv, doing=doing, names=chosen)


def exit_code(plans: Sequence[HostPlan]) -> int:
    """ERROR when a host could not be asked or there is none, else PENDING or FINE."""
    states = {plan.state for plan in plans}
    if FAILED in states or not states:
        return ERROR
    return PENDING if CHANGES in states else FINE


def document(plans: Iterable[HostPlan]) -> dict[str, Any]:
    """What --json prints (see above), without secrets and without what a terminal would act on."""
    return {"schema": SCHEMA, "hosts": [_host(plan) for plan in plans]}


def _host(plan: HostPlan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "state": plan.state,
        "error": None if plan.error is None else _clean(plan.error),
        "remarks": [_clean(sentence) for sentence in plan.remarks],
        "changes": [
            {
                "what": _clean(change.what),
                "certainty": change.certainty,
                "on": None if change.on is None else _clean(change.on),
                "reasons": [_clean(reason) for reason in change.reasons],
                "differences": [
                    # Without what a terminal would act on since operations.common.show_diff.
                    {"path": path, "text": masked(text)}
                    for path, text in change.differences.items()
                ],
            }
            for change in plan.changes
        ],
    }


def _clean(sentence: str) -> str:
    return printable(" ".join(masked(sentence).split()))


def rendered(plans: Iterable[HostPlan], *, form: Form) -> str:
    """The plans as `form` has them: for people with differences (plan) or without (drift), or as JSON."""
    told = document(plans)
    if form == "json":
        return json.dumps(told, indent=2) + "\n"
    lines = [line for host in told["hosts"] for line in _lines(host, differences=form == "plan")]
    return "".join(f"{line}\n" for line in lines)


def _lines(host: Mapping[str, Any], *, differences: bool) -> Iterable[str]:
    count = len(host["changes"])
    # Rows before an error are what would be done before it.
    pending = f"{count} change{'' if count == 1 else 's'} pending" if count else ""
    states = [host["error"] and f"error: {host['error']}", pending]
    yield f"{_bold(host['name'])}: {'; '.join(filter(None, states)) or AS_DECLARED}"
    for change in host["changes"]:
        on = f": {change['on']}" if change["on"] else ""
        yield f"  [{change['certainty']}{on}] {change['what']}"
        yield from (f"      {reason}" for reason in change["reasons"])
        for one in change["differences"] if differences else ():
            yield from (f"    {_coloured(line)}" for line in one["text"].splitlines())
    yield from (f"  note: {sentence}" for sentence in host["remarks"])


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def _coloured(line: str) -> str:
    return click.style(line, fg={"+": "green", "-": "red", "@": "cyan"}.get(line[:1]))
