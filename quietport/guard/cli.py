"""`quietport guard VERB`: arm, exec, confirm, rollback, status, run; boot is for the boot's unit.

Exit codes: 0 fine, 1 a problem, 2 usage, 3 could not tell. `exec`: those of the command; 75 when the token is
not armed (any more), 124 when the command took too long, 126 and 127 when it cannot be run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from quietport import guardlock, lasting
from quietport.errors import FINE, PROBLEM, USAGE, HostProgramError, printable
from quietport.guard import arming, fence, files, holders, rollback, scope, state, who
from quietport.guard.machine import GuardError, Log, Machine, to_journal
from quietport.guard.state import Armed

_POLL_S = 0.5
# How long a command of a guard may keep a confirmation waiting.
_CONFIRM_LOCK_S = 30.0
# A rollback that `run` waits for: two tries with sshd, and what comes before.
_ROLLBACK_S = 120.0


def main(argv: list[str]) -> int:
    """Exit codes: see the module."""
    own, command = _split(argv)
    parser = _parser()
    options = parser.parse_args(own)
    if options.verb in ("exec", "run"):
        if not command:
            parser.error(f"{options.verb} wants `-- COMMAND...`")
    elif "--" in argv:
        parser.error(f"{options.verb} takes no command")
    if os.geteuid() != 0:
        raise GuardError("only root can do this.")
    verbs: dict[str, Callable[[Machine, argparse.Namespace, list[str]], int]] = {
        "arm": _arm,
        "exec": _exec,
        "confirm": _confirm,
        "rollback": _rollback,
        "status": _status,
        "run": _run,
        "boot": _boot,
        "scope": _scope,
    }
    return verbs[options.verb](Machine(), options, command)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those after the first `--`."""
    if "--" not in argv:
        return list(argv), []
    at = list(argv).index("--")
    return list(argv[:at]), list(argv[at + 1 :])


def _seconds(text: str) -> int:
    value = int(text)
    if not arming.MIN_S <= value <= arming.MAX_S:
        raise argparse.ArgumentTypeError(f"allowed are {arming.MIN_S} to {arming.MAX_S} seconds")
    return value


def _limit(text: str) -> float:
    value = float(text)
    if not 0 < value <= arming.MAX_S:
        raise argparse.ArgumentTypeError(f"allowed is more than 0, and at most {arming.MAX_S} seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quietport guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    seconds: dict[str, Any] = {"type": _seconds, "default": arming.DEFAULT_S, "metavar": "S"}
    seconds["help"] = f"seconds until the rollback, {arming.MIN_S} to {arming.MAX_S} (default: %(default)s)"
    token: dict[str, Any] = {"metavar": "TOKEN"}
    one = verbs.add_parser("arm", help="take a snapshot, schedule the rollback, print a token")
    one.add_argument("--timeout", **seconds)
    one.add_argument("--by", metavar="TEXT", help="who arms, for others to read (default: the user)")
    one.add_argument("--confirm-over", choices=arming.OVER, default=arming.OVER[0])
    one.add_argument("--json", action="store_true")
    one = verbs.add_parser("exec", help="run `-- COMMAND...` while the guard is armed")
    one.add_argument("token", **token)
    one.add_argument(
        "--timeout", type=_limit, metavar="S", help="end it after that long (default: all that is left)"
    )
    one = verbs.add_parser("confirm", help="keep what was changed; from a login made after arming")
    one.add_argument("token", **token)
    one = verbs.add_parser("rollback", help="undo now")
    one.add_argument("token", nargs="?", **token)
    one.add_argument("--why", default="asked", help=argparse.SUPPRESS)
    one = verbs.add_parser("status", help="what is armed, and what came of the last ones")
    one.add_argument("--json", action="store_true")
    one = verbs.add_parser("run", help="arm, run `-- COMMAND...`, wait for the confirmation")
    one.add_argument("--timeout", **seconds)
    verbs.add_parser("boot", help="undo what a boot finds armed (for the boot's unit)")
    one = verbs.add_parser(
        "scope", help="what a snapshot would hold now, as JSON; or compare with such a file"
    )
    one.add_argument(
        "--against", metavar="FILE", help="print what is otherwise now; exit code 1 when anything is"
    )
    return parser


def _by(options: argparse.Namespace) -> str:
    return options.by or os.environ.get("SUDO_USER") or "root"


def _arm(machine: Machine, options: argparse.Namespace, _: list[str]) -> int:
    """--json: {"schema": 1, token, since: wall clock, left_s: seconds to the rollback, deadline_s: the same
    as seconds since boot (CLOCK_BOOTTIME)}."""
    armed = arming.arm(machine, timeout=options.timeout, by=_by(options), confirm_over=options.confirm_over)
    if options.json:
        told = {"schema": 1, "token": armed.token, "since": armed.since}
        left = round(armed.seconds_left(machine), 1)
        print(json.dumps({**told, "left_s": left, "deadline_s": round(armed.deadline_s, 1)}))
    else:
        print(armed.token)
        print(f"Armed for {armed.timeout_s} s. {_how_to_keep(armed)}", file=sys.stderr)
    return FINE


def _how_to_keep(armed: Armed) -> str:
    over = "over the tailnet " if armed.confirm_over == "tailnet" else ""
    return f"To keep what you change, log in anew {over}and type there: quietport guard confirm {armed.token}"


def _exec(machine: Machine, options: argparse.Namespace, command: list[str]) -> int:
    return fence.execute(machine, options.token, command, timeout=options.timeout)


def _confirm(machine: Machine, options: argparse.Namespace, _: list[str]) -> int:
    print(confirm(machine, options.token))
    return FINE


def confirm(machine: Machine, token: str, *, pid: int | None = None) -> str:
    """Keep what was changed, asked for by process `pid` (default: this one); a sentence that says so.

    Raises GuardError when the guard is not armed any more, or this login does not count.
    """
    armed = _require(machine, token)
    wait = min(_CONFIRM_LOCK_S, armed.seconds_left(machine))
    try:
        with guardlock.hold(timeout=wait, path=machine.path(state.LOCK)):
            armed = _require(machine, token)
            reason = who.may_confirm(
                machine, os.getpid() if pid is None else pid, armed_s=armed.since_s, over=armed.confirm_over
            )
            armed = _require(machine, token)
            log = Log(aloud=False)
            log.say(f"guard {token} confirmed {reason}")
            try:
                state.write_history(machine, rollback.entry(armed, why=reason, how="confirmed", log=log))
            except GuardError as error:
                to_journal(str(error))
            try:
                state.remove_armed(machine)
            except OSError as error:
                raise GuardError(f"{state.ARMED} cannot be removed: {error.strerror}.") from error
            arming.unschedule(machine, token)
            state.clear(machine)
    except GuardError as error:
        raise GuardError(f"not confirmed: {error}", code=error.code) from error
    except HostProgramError as error:
        at_work = ", ".join(holders.name_of(machine, pid) for pid in sorted(holders.holders(machine)))
        raise GuardError(f"not confirmed: {error} At work: {at_work or 'unknown'}.") from error
    return f"Confirmed: what was changed stays. Guard {token} is not armed any more."


def _require(machine: Machine, token: str) -> Armed:
    armed = state.read_armed(machine)
    if armed is None or armed.token != token:
        raise GuardError(fence.gone(machine, token))
    if not armed.seconds_left(machine):
        raise GuardError(f"the time of guard {token} is up, and what was changed is being undone.")
    return armed


def _rollback(machine: Machine, options: argparse.Namespace, _: list[str]) -> int:
    if options.why == "asked":
        return detached(lambda: _roll_back(machine, options.token, why="asked"))
    return _roll_back(machine, options.token, why=options.why)


def _roll_back(machine: Machine, token: str | None, *, why: str) -> int:
    done = rollback.roll_back(machine, token, why=why, log=Log())
    if done is None:
        sentence = "no guard is armed." if token is None else fence.gone(machine, token)
        if why != "asked":
            to_journal(f"nothing to undo: {sentence}")
            return FINE
        if token is not None and _is_undone(machine, token):
            # Its time was up just before: what was asked for is done.
            print(printable(sentence))
            return FINE
        print(f"quietport guard rollback: {sentence}", file=sys.stderr)
        return PROBLEM
    return FINE if done else PROBLEM


def _is_undone(machine: Machine, token: str) -> bool:
    armed = state.read_armed(machine)
    if armed is not None and armed.token == token:
        return False
    past = next((one for one in state.history(machine) if one.get("token") == token), {})
    return past.get("how") == "rolled back"


def detached(work: Callable[[], int]) -> int:
    """Do `work` to its end, also when the SSH connection that asked for it goes."""
    return lasting.to_the_end(work, crashed=lambda said: Log().say(f"rollback: {said}"))


def _status(machine: Machine, options: argparse.Namespace, _: list[str]) -> int:
    """--json: {"schema": 1, armed: null or {token, by, since, timeout_s, left_s, confirm_over, attempt: null
    or what a rollback that could not do everything said}, history: what came of the last ones, as
    state.write_history documents it, the newest first}."""
    armed, past = state.read_armed(machine), state.history(machine)
    # What is still armed has not ended, whatever was written down on the way.
    attempt = next((one for one in past if armed and one["token"] == armed.token), None)
    past = [one for one in past if one is not attempt]
    if options.json:
        shown = None
        if armed is not None:
            keys = ("token", "by", "since", "timeout_s", "confirm_over")
            shown = {key: getattr(armed, key) for key in keys}
            shown |= {"left_s": round(armed.seconds_left(machine), 1), "attempt": attempt}
        print(json.dumps({"schema": 1, "armed": shown, "history": past}, indent=2))
        return FINE
    sentence = armed.sentence(machine) if armed else "no guard is armed"
    print(f"{sentence[0].upper()}{sentence[1:]}.")
    for number, one in enumerate([attempt, *past] if attempt else past):
        line = f"{one['since']}  {one['token']}  {one['how']} ({one['why']}), armed by {one['by']}"
        print(printable(line))
        if number == 0:
            for said in one["log"]:
                print(printable(f"  {said}"))
    return FINE


def _run(machine: Machine, options: argparse.Namespace, command: list[str]) -> int:
    armed = arming.arm(
        machine, timeout=options.timeout, by=os.environ.get("SUDO_USER") or "root", confirm_over="any"
    )
    print(f"Armed for {armed.timeout_s} s.", file=sys.stderr)
    try:
        code = fence.execute(machine, armed.token, command)
        if code != 0:
            print(f"The command failed ({code}); undoing.", file=sys.stderr)
            return _undo_now(machine, armed, why=f"the command failed ({code})")
        left = armed.seconds_left(machine)
        print(f"Done, for now: {left:.0f} s are left. {_how_to_keep(armed)}", file=sys.stderr)
        while _is_armed(machine, armed) and armed.seconds_left(machine):
            machine.sleep(_POLL_S)
    except KeyboardInterrupt:
        print("\nNot waiting; undoing.", file=sys.stderr)
        return _undo_now(machine, armed, why="interrupted")
    except GuardError as error:
        if error.code != fence.NOT_ARMED:
            raise
        print(f"quietport guard run: {error}", file=sys.stderr)
    return _end_of(machine, armed)


def _undo_now(machine: Machine, armed: Armed, *, why: str) -> int:
    detached(lambda: _roll_back(machine, armed.token, why=why))
    return PROBLEM


def _is_armed(machine: Machine, armed: Armed) -> bool:
    now = state.read_armed(machine)
    return now is not None and now.token == armed.token


def _end_of(machine: Machine, armed: Armed) -> int:
    """Wait for the rollback when that is what it came to, and tell."""
    deadline = machine.now() + _ROLLBACK_S
    while _is_armed(machine, armed) and machine.now() < deadline:
        machine.sleep(_POLL_S)
    for one in state.history(machine):
        if one.get("token") == armed.token:
            print(f"{one['how']} ({one['why']}).".capitalize(), file=sys.stderr)
            if one["how"] == "confirmed" and not _is_armed(machine, armed):
                return FINE
            for said in one["log"]:
                print(printable(f"  {said}"), file=sys.stderr)
            return PROBLEM
    print("What came of it is not known; see `quietport guard status`.", file=sys.stderr)
    return PROBLEM


def _boot(machine: Machine, _: argparse.Namespace, __: list[str]) -> int:
    return boot(machine, log=Log())


def boot(machine: Machine, *, log: Log) -> int:
    """Before sshd and ufw start: the old files. What runs is put right after they have started.

    Nothing of this keeps sshd from starting: a host whose sshd is down for good is what must not be, the
    files are placed one by one and whole, and the rollback that follows does everything once more.
    """
    armed = state.read_armed(machine)
    if armed is None:
        return FINE
    if armed.boot == machine.boot() and _is_scheduled(machine, armed):
        log.say(f"guard {armed.token} was armed in this boot, and its time has not come: left alone")
        return FINE
    log.say(f"guard {armed.token} was armed when the host went down: putting the old files back")
    problems: list[str] = []
    try:
        arming.schedule_after_boot(machine, armed.token)
    except HostProgramError as error:
        problems.append(str(error))
    with holders.seized(machine, log.say):
        if not _is_armed(machine, armed):
            return FINE
        state.drop_ballast(machine)
        try:
            old = arming.load(machine, armed.token)
            problems += rollback.restore_files(machine, armed.token, old, log.say).problems
        except (HostProgramError, OSError) as error:
            problems.append(str(error))
        try:
            machine.systemctl("daemon-reload")
        except GuardError as error:
            problems.append(str(error))
    for problem in problems:
        log.say(f"before sshd starts: {problem}")
    return PROBLEM if problems else FINE


def _is_scheduled(machine: Machine, armed: Armed) -> bool:
    try:
        return arming.is_scheduled(machine, armed.token)
    except GuardError:  # a systemd that does not answer is none to rely on
        return False


def _scope(machine: Machine, options: argparse.Namespace, _: list[str]) -> int:
    now = scope.look(machine)
    if options.against is None:
        print(json.dumps(now.to_json(), indent=2))
        return FINE
    try:
        with open(options.against, "rb") as stream:  # noqa: PTH123, /dev/stdin is a file too
            document = json.loads(stream.read(files.MAX_BYTES))
    except (OSError, ValueError) as error:
        print(f"quietport guard scope: {options.against} cannot be read: {error}", file=sys.stderr)
        return USAGE
    left = scope.compare(scope.from_json(document), now)
    for line in left:
        print(printable(line))
    return PROBLEM if left else FINE
