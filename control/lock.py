"""The lock on a host: one converge at a time, whoever runs it and from wherever.

It is held by a process of the controller's own session, so the kernel frees it when the controller, its
link or the host dies, and nothing is ever left to remove by hand. All of it is in /run/quietport (0700
root), which a reboot empties:

    lock            flock(2): held while a controller is at it, shared by the sessions of one run
    lock.owner      who that is: a token of the run, user@machine, process id, since (UTC), a line each
    lock.beat       touched whenever the controller is heard of
    lock.commands   flock(2): shared by every command of the run for as long as it goes on
    lock.mutex      flock(2): held while the others are looked at or changed

A controller that stalls loses the lock after SILENCE_S and may wake up later. So every command is fenced: it
runs only while lock.owner still names its run, and a new controller lets a command end that was begun before.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shlex
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from paramiko import SSHException

from control.errors import ReachError
from control.session import Conversation, Session
from quietport.errors import printable

DIRECTORY = "/run/quietport"
# The controller is heard of every BEAT_S seconds. Silent for LATE_S, it is waited for instead of believed.
BEAT_S = 15.0
LATE_S = 25
# Longer than a session takes to find its link dead (control/session.py).
SILENCE_S = 90
# What a dead run began (an installation, say) may take that long to end.
PATIENCE_S = 600
ANSWER_S = 30.0
FAREWELL_S = 5.0
# Of this process: what it holds, all its sessions hold.
TOKEN = secrets.token_hex(16)
# Characters of a text of the host's that are shown.
SHOWN = 200

# $1 directory, $2 token, $3 who, $4 process id, $5 "take" or "keep", $6 LATE_S, $7 SILENCE_S, $8 PATIENCE_S.
# bash and util-linux are essential packages of Debian; dash has no `read -t`.
_HOLDER = r"""
export LC_ALL=C
umask 077
dir=$1 token=$2 who=$3 pid=$4 mode=$5 late=$6 silence=$7 patience=$8
mkdir -p -- "$dir" && cd -- "$dir" || exit 1
# Whoever can write here can take the lock away.
found=$(stat -c '%F, %a, of user %u' -- "$dir")
[ "$found" = "directory, 700, of user $UID" ] || { echo "$dir is a $found"; exit 1; }
exec 7>>lock.mutex 8>>lock 9>>lock.commands || exit 1

owner() { # -> o_token o_who o_pid o_since; empty when nobody is named
    o_token= o_who= o_pid= o_since=
    { read -r o_token; read -r o_who; read -r o_pid; read -r o_since; } 2>/dev/null <lock.owner
}
tell() { printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$o_who" "$o_pid" "$o_since" "${2-}"; }
quiet_for() { echo $(($(date +%s) - $(stat -c %Y lock.beat 2>/dev/null || echo 0))); }
pause() { # a second; ends with the controller
    read -r -t 1 word || [ $? -gt 128 ] || exit 0
}
named() { # the first process that has lock.commands locked, or rather what that one waits for
    local fd p child
    for fd in /proc/[0-9]*/fd/9; do
        p=${fd#/proc/} p=${p%%/*}
        [ "$fd" -ef lock.commands ] && grep -qs '^lock:' "/proc/$p/fdinfo/9" || continue
        # The kernel ends that list without a newline, which read takes for a failure.
        while child=; read -r child _ <"/proc/$p/task/$p/children"; [ -n "$child" ]; do
            p=$child
        done 2>/dev/null
        printf '%s (pid %s)' "$(cat "/proc/$p/comm")" "$p" 2>/dev/null
        return
    done
}
try() { # 0 held, 1 somebody else's, 2 lost
    owner
    if [ "$mode" = keep ] && [ "$o_token" != "$token" ]; then return 2; fi
    if [ "$o_token" = "$token" ]; then o_who= o_pid= o_since=; flock -n -s 8; return; fi
    flock -n -x 8 || return 1
    printf '%s\n' "$token" "$who" "$pid" "$(date -u '+%Y-%m-%d %H:%M:%S')" >lock.new &&
        mv -f lock.new lock.owner && : >lock.beat || exit 1
    # Not atomic (flock(2)), but whoever wants it needs the mutex first.
    flock -s 8
}

said=
while :; do
    flock -x 7
    try; outcome=$?
    quiet=$(quiet_for)
    flock -u 7
    case $outcome in
        0) break ;;
        2) tell lost; exit 0 ;;
    esac
    # A dead link is noticed by its silence: then it is a matter of seconds.
    [ "$quiet" -ge "$late" ] || { tell refused "$quiet"; exit 0; }
    [ -n "$said" ] || tell waiting "$quiet"
    said=1
    pause
done
if [ "$mode" = take ]; then
    said=
    until flock -n -x 9; do
        [ "$SECONDS" -lt "$patience" ] || { tell busy "$(named)"; exit 0; }
        [ -n "$said" ] || tell finishing "$(named)"
        said=1
        pause
    done
    flock -u 9
fi
: >lock.beat
tell held
while read -r -t "$silence" word; do
    if [ "$word" = end ]; then
        flock -x 7
        owner
        if [ "$o_token" = "$token" ]; then rm -f lock.owner lock.beat; fi
        exit 0
    fi
    : >lock.beat
done
"""

# The lock's descriptor stays with this shell: a daemon that the command starts would hold it for good.
_FENCE = """[ -e {directory}/lock.owner ] ||
{{ echo 'refused: the lock of this run is gone; nothing was done. Run again.' >&2; exit 1; }}
exec 9>>{directory}/lock.commands
flock -s 9
{{ read -r token; read -r who; read -r pid; read -r since; }} <{directory}/lock.owner
[ "$token" = {token} ] ||
{{ echo "refused: $who (process $pid) took the lock over at $since UTC; nothing was done." >&2; exit 1; }}
(
{line}
) 9>&-
exit $?"""


@dataclass(frozen=True)
class Owner:
    """Who has, or had, the lock of a host: `user@machine`, its process, since when (UTC, by the host)."""

    who: str
    pid: str
    since: str

    def __str__(self) -> str:
        return f"{self.who} (process {self.pid}) since {self.since} UTC"


class LockError(ReachError, SSHException):
    """The lock of a host is somebody else's, or cannot be had. As an SSHException: see LinkLost."""


def refusal(owner: Owner, quiet_s: int) -> str:
    """Why a host that another controller is at is left alone, as a sentence."""
    return (
        f"another converge is at work here: {owner}, last heard of {max(0, quiet_s)} s ago. "
        "Wait for it to end, then run again."
    )


def fenced(line: str) -> str:
    """`line`, run on the host only while this run owns its lock."""
    return _FENCE.format(directory=DIRECTORY, token=TOKEN, line=line)


class HostLock:
    """The lock of one host, held from `take` until `release` or until this process dies."""

    def __init__(self, name: str, conversation: Conversation, wanted: Callable[[], bool]) -> None:
        self._conversation = conversation
        self._wanted = wanted
        self._over = threading.Event()
        threading.Thread(target=self._beat, name=f"lock {name}", daemon=True).start()

    @staticmethod
    def take(
        session: Session,
        *,
        say: Callable[[str], None] = lambda sentence: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> HostLock:
        """Take the lock over `session`; waits for what a dead run left behind, and says what and whose.

        It is given back when `wanted` says no: others may work on a host that has failed while the rest of a
        run goes on. Raises LockError with who has it and since when, ReachError when it cannot be had at all.
        """
        return HostLock(session.name, _hold(session, "take", say), wanted)

    def move(self, session: Session) -> None:
        """Hold it over another session of the same run; then the one before may be closed.

        Raises LockError when another controller has taken it in the meantime.
        """
        before, self._conversation = self._conversation, _hold(session, "keep", lambda sentence: None)
        before.close()

    @property
    def held(self) -> bool:
        """Whether its holder lives, as far as is known."""
        return self._conversation.alive

    def release(self) -> None:
        """Give it back. Harmless when it is lost: then there is nothing to give."""
        self._over.set()
        with contextlib.suppress(ReachError, TimeoutError):
            self._conversation.say("end")
            # What is sent just before a connection closes may not arrive.
            while self._conversation.hear(FAREWELL_S) is not None:
                pass
        self._conversation.close()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            if not self._wanted():
                self.release()
            # A lost link is told by whoever uses it next.
            with contextlib.suppress(ReachError):
                self._conversation.say("beat")


def _hold(session: Session, mode: str, say: Callable[[str], None]) -> Conversation:
    numbers = [str(number) for number in (LATE_S, SILENCE_S, PATIENCE_S)]
    argv = ["bash", "-c", _HOLDER, "bash", DIRECTORY, TOKEN, who(), str(os.getpid()), mode, *numbers]
    conversation = session.converse(f"exec {shlex.join(argv)}")
    try:
        _await_lock(session.name, conversation, say)
    except BaseException:
        conversation.close()
        raise
    return conversation


def _await_lock(name: str, conversation: Conversation, say: Callable[[str], None]) -> None:
    heard = ""
    limit = ANSWER_S
    while (line := _next(name, conversation, limit)) is not None:
        word, *fields = line.split("\t")
        if len(fields) != 4:
            heard = line
            continue
        owner, more = (
            Owner(*(printable(field, limit=SHOWN) for field in fields[:3])),
            printable(fields[3], limit=SHOWN),
        )
        if word == "held":
            if owner.who:
                say(f"the converge of {owner} ended without finishing; this one goes on from there.")
            return
        if word == "waiting":
            say(f"waiting for {owner}, not heard of for {more} s: its lock ends after {SILENCE_S} s.")
            limit = SILENCE_S + ANSWER_S
        elif word == "finishing":
            say(f"waiting for what a converge that ended without finishing began: {more or 'a command'}.")
            limit = PATIENCE_S + ANSWER_S
        elif word == "refused":
            raise LockError(f"{name}: {refusal(owner, int(more))}")
        elif word == "busy":
            raise LockError(
                f"{name}: what an earlier converge began still runs after {PATIENCE_S} s: {more}.",
                hint="Wait for it or end it, then run again.",
            )
        elif word == "lost":
            taken = f" to {owner}" if owner.who else ""
            raise LockError(
                f"{name}: the lock of this run was lost{taken}.", hint="Run again when it is free."
            )
    raise LockError(
        f"{name}: the lock in {DIRECTORY} cannot be had: "
        f"{printable(heard, limit=SHOWN) or 'the host said nothing'}.",
        hint="Mend it, then run again.",
    )


def _next(name: str, conversation: Conversation, limit: float) -> str | None:
    try:
        return conversation.hear(limit)
    except TimeoutError as error:
        raise LockError(
            f"{name}: no answer about its lock within {limit:.0f} s.", hint="Run again."
        ) from error


def who() -> str:
    """user@machine, in characters that are safe wherever they are shown."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = str(os.getuid())
    return re.sub(r"[^A-Za-z0-9@._-]", "_", f"{user}@{socket.gethostname()}")
