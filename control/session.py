"""A live SSH session to one host, in which commands run as root.

The password sudo asks for goes to sudo's standard input, never through argv or the environment. A link
that was cut silently is noticed: paramiko's own keepalive waits for no answer, so the session asks
questions that sshd must answer, and ends when it does not.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import paramiko

from control.errors import ReachError
from control.secret import Secret

Way = Literal["public", "tailnet"]
Auth = Literal["publickey", "password"]
OnOutput = Callable[[str, bytes], None]

OPEN_TIMEOUT_S = 30.0
KEEPALIVE_S = 15.0
# TCP repeats what was lost at intervals that double: after a cut of 20 s the next try may come 20 s later.
SILENCE_S = 45.0
REMOTE_GRACE_S = 5
_CHUNK = 1 << 16
# Separates sudo's password line from what the command reads. No secret.
_MARK = b"quietport-begins\n"
_AFTER_MARK = (
    'IFS= read -r line; [ "$line" = quietport-begins ] || IFS= read -r line; unset line; exec sh -c "$1"'
)


class LinkLost(ReachError, paramiko.SSHException):
    """The connection is gone. As an SSHException, pyinfra fails the one host with it."""


@dataclass(frozen=True)
class Result:
    """What a command did. `exit_code` is -1 when a signal ended it."""

    exit_code: int
    stdout: bytes
    stderr: bytes


class Session:
    """One SSH connection. Made by `control.reach.open_session`."""

    def __init__(
        self,
        transport: paramiko.Transport,
        *,
        name: str,
        way: Way,
        address: str,
        port: int,
        user: str,
        auth: Auth,
        sudo_password: Callable[[], Secret] | None = None,
        close_route: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.way = way
        self.address = address
        self.port = port
        self.user = user
        self.auth = auth
        self._transport = transport
        self._sudo_password = sudo_password
        self._close_route = close_route
        self._sudo: Literal["", "free", "password"] = ""
        self._password_line = b""
        self._closing = threading.Event()
        self._silent = False
        threading.Thread(target=self._keep_alive, name=f"keepalive {name}", daemon=True).start()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return not self._closing.is_set() and self._transport.is_active()

    @property
    def server_version(self) -> str:
        """How the server named itself, as in `SSH-2.0-OpenSSH_9.2p1`."""
        return str(self._transport.remote_version)

    def close(self) -> None:
        """Close the connection and end the program that carried it. Harmless when it is closed."""
        if not self._closing.is_set():
            self._closing.set()
            self._transport.close()
            self._close_route()

    def run(
        self,
        command: str,
        *,
        stdin: bytes | Secret | None = None,
        timeout: float | None = None,
        escalate: bool = True,
        on_output: OnOutput | None = None,
    ) -> Result:
        """Run a shell command, as root unless `escalate` is False, and wait for it.

        `stdin` reaches the command byte for byte. With `timeout` (seconds) TimeoutError is raised when it is
        over, and the host ends the command itself a moment later, also when the link is cut. `on_output` is
        called with "stdout" or "stderr" and each piece, from other threads.
        Raises ReachError when root cannot be had or the link is lost.
        """
        payload = stdin.reveal() if isinstance(stdin, Secret) else stdin or b""
        line = shlex.join(["sh", "-c", command])
        if timeout is not None:
            # The host must not go on with what the operator was told has failed.
            line = (
                shlex.join(["timeout", f"--kill-after={REMOTE_GRACE_S}", str(math.ceil(timeout) + 1)])
                + " "
                + line
            )
        if escalate:
            line, before = self._as_root(line)
            payload = before + payload
        return self._execute(line, payload, timeout, on_output)

    def converse(self, command: str) -> Conversation:
        """Start a shell command as root and leave it running, its input open, until it is closed.

        Raises ReachError when root cannot be had or the link is lost.
        """
        line, before = self._as_root(shlex.join(["sh", "-c", command]))
        try:
            channel = self._transport.open_session(timeout=OPEN_TIMEOUT_S)
            channel.set_combine_stderr(True)
            channel.exec_command(line)
            if before:
                channel.sendall(before)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._lost(str(error)) from error
        return Conversation(channel, self._lost)

    def _as_root(self, line: str) -> tuple[str, bytes]:
        """The command line that runs `line` as root, and what goes into its input first."""
        if self.user == "root":
            return line, b""
        self.become_root()
        if self._sudo == "free":
            return f"sudo -n -H -- {line}", b""
        # If sudo asks for no password after all, the mark keeps it out of the command's input.
        marked = shlex.join(["sh", "-c", _AFTER_MARK, "sh", line])
        return f"sudo -k -S -H -p '' -- {marked}", self._password_line + _MARK

    def become_root(self) -> None:
        """Find out how this user becomes root. Raises ReachError with what is missing."""
        if self.user == "root" or self._sudo:
            return
        probe = self._execute("env LC_ALL=C sudo -n -k -H -- sh -c :", b"", OPEN_TIMEOUT_S, None)
        if probe.exit_code == 0:
            self._sudo = "free"
            return
        complaint = probe.stderr.decode("utf-8", "replace")
        if probe.exit_code == 127 or "No such file" in complaint:
            raise ReachError(
                f"{self.name}: {self.user} is not root, and the host has no sudo.", hint="Log in as root."
            )
        _refuse_without_right(self.name, self.user, complaint)
        if self._sudo_password is None:
            raise ReachError(
                f"{self.name}: sudo asks {self.user} for a password.",
                hint="Give its source as sudo_password in hosts.toml, or log in as root.",
            )
        self._try_password(self._sudo_password())

    def _try_password(self, password: Secret) -> None:
        if b"\n" in password.stripped().reveal():
            raise ReachError(
                f"{self.name}: sudo_password has more than one line.", hint="Correct its source."
            )
        line = password.stripped().reveal() + b"\n"
        tried = self._execute("env LC_ALL=C sudo -k -S -H -p '' -- sh -c :", line, OPEN_TIMEOUT_S, None)
        if tried.exit_code != 0:
            complaint = tried.stderr.decode("utf-8", "replace")
            _refuse_without_right(self.name, self.user, complaint)
            raise ReachError(
                f"{self.name}: sudo refused the password of {self.user}.",
                hint="Correct what sudo_password points at.",
            )
        self._password_line = line
        self._sudo = "password"

    def _execute(
        self, line: str, payload: bytes, timeout: float | None, on_output: OnOutput | None
    ) -> Result:
        done = _Running(line, payload, on_output)
        worker = threading.Thread(
            target=done.drive, args=(self._transport,), name=f"run {self.name}", daemon=True
        )
        worker.start()
        try:
            worker.join(timeout)
            if worker.is_alive():
                raise TimeoutError(f"{self.name}: a command took longer than {timeout} s")
        finally:
            done.close()
        if done.exit_code == -1 and (done.failed or not self.alive):
            raise self._lost(done.failed)
        return Result(done.exit_code, b"".join(done.pieces["stdout"]), b"".join(done.pieces["stderr"]))

    def _lost(self, reason: str) -> LinkLost:
        why = (
            f"it was silent for {SILENCE_S:.0f} s" if self._silent else reason.rstrip(".") or "it was closed"
        )
        return LinkLost(
            f"{self.name}: the connection to {self.address} is lost: {why}.",
            hint="Run the same command again.",
        )

    def _keep_alive(self) -> None:
        while not self._closing.wait(KEEPALIVE_S) and self._transport.is_active():
            alarm = threading.Timer(SILENCE_S, self._give_up)
            alarm.daemon = True
            alarm.start()
            # RFC 4254, section 4: a server answers every global request that wants a reply, unknown ones too.
            with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
                self._transport.global_request("keepalive@openssh.com", wait=True)
            alarm.cancel()

    def _give_up(self) -> None:
        self._silent = True
        self.close()


class Conversation:
    """A command that goes on while it is talked to, a line at a time. Made by `Session.converse`."""

    def __init__(self, channel: paramiko.Channel, lost: Callable[[str], LinkLost]) -> None:
        self._channel = channel
        self._lost = lost
        self._heard = b""

    @property
    def alive(self) -> bool:
        """Whether the command runs, as far as is known."""
        return not (self._channel.closed or self._channel.eof_received)

    def say(self, line: str) -> None:
        """Send a line. Raises LinkLost when nobody is there to read it."""
        try:
            self._channel.sendall(f"{line}\n".encode())
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self._lost(str(error)) from error

    def hear(self, timeout: float) -> str | None:
        """The next line of its output, errors included; None at its end.

        Raises TimeoutError when there is none within `timeout` seconds, LinkLost when the link is gone.
        """
        self._channel.settimeout(timeout)
        while b"\n" not in self._heard:
            try:
                piece = self._channel.recv(_CHUNK)
            except TimeoutError:
                raise
            except (paramiko.SSHException, OSError, EOFError) as error:
                raise self._lost(str(error)) from error
            if not piece:
                if not self._channel.get_transport().is_active():
                    raise self._lost("")
                rest, self._heard = self._heard, b""
                return rest.decode("utf-8", "replace") if rest else None
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode("utf-8", "replace")

    def close(self) -> None:
        """End its input and its output. Harmless when it has ended."""
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            self._channel.close()


class _Running:
    """One command on one channel: input, output and errors flow at the same time."""

    def __init__(self, line: str, payload: bytes, on_output: OnOutput | None) -> None:
        self.pieces: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self.exit_code = -1
        self.failed = ""
        self._line = line
        self._payload = payload
        self._on_output = on_output
        self._channel: paramiko.Channel | None = None
        self._closed = False

    def drive(self, transport: paramiko.Transport) -> None:
        """Run it to the end. Never raises: what went wrong is `failed`."""
        try:
            self._channel = transport.open_session(timeout=OPEN_TIMEOUT_S)
            if self._closed:
                self._channel.close()
                return
            self._channel.exec_command(self._line)
            others = [
                threading.Thread(target=self._write, args=(self._channel,), daemon=True),
                threading.Thread(target=self._read, args=(self._channel.recv_stderr, "stderr"), daemon=True),
            ]
            for thread in others:
                thread.start()
            self._read(self._channel.recv, "stdout")
            for thread in others:
                thread.join()
            self.exit_code = self._channel.recv_exit_status()
        except (paramiko.SSHException, OSError, EOFError) as error:
            self.failed = str(error) or "it was closed"

    def close(self) -> None:
        """Close the channel; everything that waits on it ends."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()

    def _write(self, channel: paramiko.Channel) -> None:
        # A command may end without reading its input.
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.sendall(self._payload)
            channel.shutdown_write()

    def _read(self, receive: Callable[[int], bytes], stream: str) -> None:
        with contextlib.suppress(OSError, EOFError):
            while piece := receive(_CHUNK):
                self.pieces[stream].append(piece)
                if self._on_output:
                    self._on_output(stream, piece)


def _refuse_without_right(name: str, user: str, complaint: str) -> None:
    if any(text in complaint for text in ("not in the sudoers", "may not run sudo", "not allowed to")):
        raise ReachError(
            f"{name}: {user} has no right to use sudo.",
            hint="Put the user into the sudo group, or log in as root.",
        )
