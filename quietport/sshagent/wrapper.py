"""A session from its start to its end, seen from the process that the caller started."""

from __future__ import annotations

import os
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

from quietport.sshagent import audit, sessions
from quietport.sshagent import watch as watching
from quietport.sshagent.job import (
    InterruptedStartError,
    Job,
    Original,
    Witness,
    interrupted,
    read_patiently,
    start,
)
from quietport.sshagent.names import (
    SESSION_VARIABLE,
    AgentAccessError,
    complain,
    duration,
    now,
    stamp,
)
from quietport.sshagent.process import Process, boottime, hide
from quietport.sshagent.record import Record, agent_env
from quietport.sshagent.root import Root, locked, open_root, staging
from quietport.sshagent.spawn import environment, spawn, standard_descriptors
from quietport.sshagent.wanted import CommandError, Tools, Wanted, find_tools

# sizeof(sun_path) - 1, unix(7).
MAX_SOCKET = 107
LOAD_S = 60.0
MAX_SAID = 1 << 16
# How long an agent lives on for the sake of the lock, and the wrapper to write its end down.
AGENT_LOCK_S = 1.0
END_LOCK_S = 5.0
# What may be repeated of what ssh-add says: the rest could hold anything.
_UNREADABLE = re.compile(r'Error loading key "[^"\n]*": |Enter passphrase')
_KNOWN = re.compile(
    r"invalid format|error in libcrypto|incorrect passphrase|unknown or unsupported key type|"
    r"No host keys found for destination|unknown option|illegal option|agent refused operation|"
    r"Could not open a connection|communication with agent"
)


def run(wanted: Wanted, key: int) -> int:
    """Have a session; `key` is a descriptor from which ssh-add shall read the private key.

    Returns the exit code of the command, 128+N for a signal. Raises AgentAccessError; nothing is left behind.
    """
    original = Original.take()
    hide()
    standard_descriptors()
    tools = find_tools(wanted.command)
    root = open_root(wanted.runtime_root, create=True, sockets=True)
    try:
        return _Run(wanted, tools, root, key, original).run()
    except InterruptedStartError as error:
        return 128 + error.number
    finally:
        root.close()


@dataclass
class _Run:
    wanted: Wanted
    tools: Tools
    root: Root
    key: int
    original: Original
    began: float = field(default_factory=boottime)

    def run(self) -> int:
        created = now()
        self.id = sessions.new_id(created)
        self.socket = self.root.sockets_path / self.id
        sockets = self.root.sockets
        if sockets is None or len(os.fsencode(self.socket)) > MAX_SOCKET:
            raise AgentAccessError(
                f"{self.socket} is too long for a socket (at most {MAX_SOCKET} bytes): "
                "choose a shorter --runtime-root."
            )
        self.sockets = sockets
        self.watch = watching.start(
            ssh_agent=self.tools.ssh_agent,
            name=self.id,
            sockets=sockets,
            ttl_s=self.wanted.ttl_s,
            deadline=self.began + self.wanted.ttl_s,
        )
        published = False
        try:
            self.watch.started(self._report())
            record = self._record(stamp(created), stamp(created + timedelta(seconds=self.wanted.ttl_s)))
            sessions.publish(self.root, record, agent_env(self.socket, record.agent))
            published = True
            self._load()
            with locked(self.root):
                audit.append(self.root, "key_loaded", self.id)
            interrupted()
            path = self.tools.command
            argv = self.wanted.command or (path,)
            witness = Witness.start()
            command = start(path, argv, env=self._environment(), original=self.original)
        except BaseException as error:
            self.watch.stop()
            if published:
                self._discard(error)
            raise
        self.record = record
        code = Job(command, witness, self._child_ended).wait()
        witness.stop()
        status = code if code >= 0 else 128 - code
        if self.record.ended:
            self._exited(status)
        elif boottime() >= self.record.deadline_s:
            # The watch is about to say so, and whoever lists it in this moment does.
            self._finish("expired", "ttl", status)
        else:
            self._finish("stopped", "command-ended" if code >= 0 else "command-killed", status)
        return status

    def _report(self) -> bytes:
        try:
            return read_line(self.watch.report, seconds=watching.START_S + 2 * watching.GRACE_S)
        except TimeoutError:
            return b'{"error": "its watch says nothing"}'
        finally:
            os.close(self.watch.report)

    def _record(self, created_at: str, expires_at: str) -> Record:
        agent, keeper = self.watch.agent, self.watch.keeper
        if agent is None or keeper is None:
            raise AgentAccessError("ssh-agent cannot be started: its watch names no process.")
        return Record(
            id=self.id,
            created_at=created_at,
            expires_at=expires_at,
            ttl_s=self.wanted.ttl_s,
            deadline_s=self.began + self.wanted.ttl_s,
            hosts=self.wanted.hosts,
            wrapper=Process.of(os.getpid()),
            keeper=keeper,
            agent=agent,
        )

    def _environment(self) -> dict[bytes, bytes]:
        env = dict(os.environb)
        env.pop(b"SSH_AGENT_PID", None)
        env[b"SSH_AUTH_SOCK"] = os.fsencode(self.socket)
        env[SESSION_VARIABLE.encode()] = self.id.encode()
        return env

    def _load(self) -> None:
        """Let ssh-add read the key; it connects to the socket by its name in a directory that is open."""
        reader, writer = os.pipe()
        argv = [self.tools.ssh_add, "-t", str(self.wanted.ttl_s)]
        for host in self.wanted.hosts:
            argv += ["-h", host]
        if self.wanted.hosts:
            argv += ["-H", os.fspath(self.wanted.known_hosts)]
        env = environment(SSH_AUTH_SOCK=self.id, SSH_ASKPASS_REQUIRE="never")
        child = spawn(
            [*argv, "-"],
            env=env,
            directory=self.sockets,
            stdin=self.key,
            output=writer,
            dies_with_us=True,
        )
        os.close(writer)
        if self.key > 2:
            os.close(self.key)
        try:
            try:
                said = read_patiently(reader, seconds=LOAD_S, most=MAX_SAID)
            finally:
                os.close(reader)
            code = _exit_code(child, seconds=LOAD_S)
        except TimeoutError:
            _kill(child)
            raise AgentAccessError(f"ssh-add took longer than {LOAD_S:g} s to load the key.") from None
        except BaseException:
            _kill(child)
            raise
        if code != 0:
            raise AgentAccessError(_load_failure(code, said.decode(errors="replace")))

    def _discard(self, error: BaseException) -> None:
        """Take away a session that came to nothing; the audit keeps that it did."""
        reason = "key-not-loaded"
        if isinstance(error, InterruptedStartError):
            reason = "interrupted"
        elif isinstance(error, CommandError):
            reason = "command-not-started"
        try:
            with locked(self.root, timeout=END_LOCK_S), staging(self.root) as place:
                # On a full disk the session goes all the same.
                with suppress(AgentAccessError):
                    audit.append(
                        self.root,
                        "stopped",
                        self.id,
                        reason=reason,
                        duration_s=self._lasted(),
                        exit_status=None,
                    )
                sessions.discard(self.root, self.id, place)
        except (AgentAccessError, OSError) as failure:
            complain(f"The session {self.id} could not be taken away: {failure}")

    def _lasted(self) -> float:
        return round(boottime() - self.began, 3)

    def _child_ended(self, pid: int, status: int) -> None:
        """The watch has ended, and the agent with it: because of the TTL, --stop, or something unforeseen."""
        if pid != self.watch.pid:
            return
        code = self.watch.exit_code = os.waitstatus_to_exitcode(status)
        if code == watching.TTL_OVER:
            end = self._finish("expired", "ttl", None)
        elif code == watching.AGENT_DIED:
            end = self._finish("crashed", "agent-died", None)
        else:
            end = self._finish("crashed", "watch-died", None)
        why = {
            "ttl": f"has reached its TTL of {duration(self.wanted.ttl_s)}",
            "stop-requested": "was stopped",
            "agent-died": "lost its agent",
        }.get(end.exit_reason or "", "lost the process that watches its agent")
        complain(f"The session {self.id} {why}: its keys and its agent are gone; the command goes on.")

    def _finish(self, status: str, reason: str, exit_status: int | None) -> Record:
        seconds = min(boottime() - self.began, self.wanted.ttl_s)
        end = sessions.over(
            self.record, status=status, reason=reason, exit_status=exit_status, seconds=seconds
        )
        try:
            # The agent ends with the lock held: nobody shall see it gone and its end not written down.
            with self._locked_soon():
                self.watch.stop()
                self.record = sessions.end(self.root, end)
        except (AgentAccessError, OSError) as error:
            self.record = end
            complain(f"The agent is gone, but the end of {self.id} cannot be written down: {error}")
        finally:
            self.watch.stop()
        return self.record

    @contextmanager
    def _locked_soon(self) -> Iterator[None]:
        """The lock of the root; the agent ends without it when it cannot be had in a moment."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.root, timeout=AGENT_LOCK_S))
            except AgentAccessError:
                self.watch.stop()
                stack.enter_context(locked(self.root, timeout=END_LOCK_S))
            yield

    def _exited(self, status: int) -> None:
        with suppress(AgentAccessError, OSError), locked(self.root, timeout=END_LOCK_S):
            sessions.exited(self.root, self.id, status)


def read_line(descriptor: int, *, seconds: float) -> bytes:
    """One line. Raises TimeoutError and InterruptedStartError."""
    line = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while b"\n" not in line:
        interrupted()
        if poll.poll(20):
            part = os.read(descriptor, 4096)
            if not part:
                break
            line += part
        elif time.monotonic() >= deadline:
            raise TimeoutError
    return line


def _load_failure(code: int, said: str) -> str:
    match = _KNOWN.search(said)
    word = match[0] if match else ""
    if word in ("unknown option", "illegal option"):
        return "ssh-add knows no destination constraints: --allow-host needs OpenSSH 8.9 or newer."
    if _UNREADABLE.search(said):
        why = f" ({word})" if word else ""
        return f"ssh-add cannot read the private key{why}: check that it is whole and has no passphrase."
    return f"ssh-add could not load the key (exit code {code}{': ' if word else ''}{word})."


def _exit_code(child: int, *, seconds: float) -> int:
    """How `child` ended. Raises TimeoutError and InterruptedStartError."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        interrupted()
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(0.001)


def _kill(child: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
