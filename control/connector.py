"""pyinfra's way to our hosts: `@quietport/NAME`, always as root, always through `control.reach`.

pyinfra's own SSH connector puts a sudo password into the remote command line, uploads through a
predictable file in /tmp and loses a command's output when it is no UTF-8. This one does none of that.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from io import IOBase
from typing import IO, Any, cast

from paramiko import SSHException
from pyinfra import logger
from pyinfra.api.command import StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.output import echo, format_text
from pyinfra.api.util import get_file_io
from pyinfra.connectors.ssh import SSHConnector
from pyinfra.connectors.util import CommandOutput, OutputLine, make_unix_command
from typing_extensions import override

from control import guard
from control.errors import QuietportError
from control.lock import HostLock, fenced
from control.reach import open_session
from control.secret import Secret
from control.session import LinkLost, Session
from control.settings import fleet, settings_for

# A command or a fact without a limit of its own: none of them takes long, but a disk may be slow.
COMMAND_LIMIT_S = 600

# Arguments that say how to become another user with pyinfra's own means. We are root already.
_SHELL_ARGUMENTS = ("_env", "_chdir", "_shell_executable")

# $1: path, $2: size. A link that is cut ends the input early, hence the size.
_PUT = """
set -eu
umask 077
target=$(readlink -m -- "$1")
temp=$(mktemp -- "$(dirname -- "$target")/.quietport.XXXXXXXXXX")
trap 'rm -f -- "$temp"' EXIT
cat > "$temp"
[ "$(stat -c %s -- "$temp")" = "$2" ] || { echo "upload of $1 is incomplete" >&2; exit 1; }
if [ -e "$target" ]; then
    chown --reference="$target" -- "$temp"
    chmod --reference="$target" -- "$temp"
else
    chmod 0644 -- "$temp"
fi
mv -fT -- "$temp" "$target"
trap - EXIT
"""


class Unanswered(CommandOutput):
    """What a command said until its link broke or its time was up; how it ended on the host is not known.

    `sentence` says why; it is the last line, too.
    """

    def __init__(self, name: str, lines: Iterable[OutputLine], sentence: str) -> None:
        self.sentence = sentence
        super().__init__([*lines, OutputLine("stderr", f"{name}: failed: {sentence}")])


class QuietportConnector(SSHConnector):
    """Runs everything as root on a host of hosts.toml, on a connection from `control.reach`."""

    handles_execution = True
    session: Session | None = None
    lock: HostLock | None = None

    @override
    @staticmethod
    def make_names_data(name: str | None) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """Yield the plain name; `@quietport` alone is every host. Raises SettingsError for an unknown one."""
        for known in [name] if name else list(fleet().hosts):
            settings_for(known)
            yield known, {}, []

    @override
    def connect(self) -> None:
        """Connect and make sure of root. Raises ConnectError with our sentence: only this host fails."""
        try:
            session = open_session(self.host.name)
            try:
                session.become_root()
            except BaseException:
                session.close()
                raise
        except (QuietportError, SSHException, OSError) as error:
            raise ConnectError(self._without_name(str(error))) from error
        self.switch(session)

    @override
    def disconnect(self) -> None:
        """See that what is not proven is undone, give the lock back, and close the connection."""
        undone = guard.give_up(
            self.host.name, self.session, say=lambda line: logger.info(f"{self.host.print_prefix}  {line}")
        )
        if undone is not None:
            logger.error(f"{self.host.print_prefix}{self.host.name}: undone: {undone}")
        if self.lock is not None:
            self.lock.release()
            self.lock = None
        if self.session is not None:
            self.session.close()
            self.session = None

    def take_lock(self) -> None:
        """Be the only controller at this host until it fails or `disconnect`; each command is fenced now.

        Raises LockError with who has it and since when, ReachError when it cannot be had.
        """
        if self.lock is None:
            self.lock = HostLock.take(
                self._live(),
                say=lambda sentence: logger.info(f"{self.host.print_prefix}{sentence}"),
                wanted=lambda: self.host not in self.state.failed_hosts,
            )

    def switch(self, session: Session) -> None:
        """Go on with another session of the same host, and close the one used until now.

        Raises LockError when another controller has taken the host; then nothing is switched.
        """
        if self.lock is not None:
            self.lock.move(session)
        before, self.session = self.session, session
        if before is not None and before is not session:
            before.close()
        if before is None or (before.way, before.address) != (session.way, session.address):
            login = "" if session.user == "root" else f" as {session.user}"
            logger.info(
                f"{self.host.print_prefix}reached by its {session.way} address {session.address}{login}"
            )

    @override
    def run_shell_command(
        self,
        command: StringCommand | str,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> tuple[bool, CommandOutput]:
        """Run a command as root, or as `_sudo_user` / `_su_user`.

        `_stdin` as bytes or Secret reaches the command unchanged; text gets the line ends pyinfra gives it.
        Never raises for the host's sake: Unanswered is the output when the connection is gone, root cannot be
        had, or `_timeout` seconds (COMMAND_LIMIT_S without it) are over.
        """
        if not isinstance(command, StringCommand):
            command = StringCommand(command)
        shell = {key: arguments[key] for key in _SHELL_ARGUMENTS if key in arguments}
        unix_command = make_unix_command(command, **shell)
        if str(unix_command) != unix_command.get_raw_value():
            return False, _said(
                "refused: a hidden value would show in the host's process list. Hand it over by _stdin."
            )
        logger.debug("Running command on %s: %s", self.host.name, unix_command)
        if print_input:
            echo(f"{self.host.print_prefix}>>> {unix_command}", err=True)
        line = _as_user(
            unix_command.get_raw_value(), arguments.get("_sudo_user") or arguments.get("_su_user")
        )
        lines = _Lines(self.host.print_prefix, show=print_output)
        limit = arguments.get("_timeout") or COMMAND_LIMIT_S
        try:
            result = self._live().run(
                self._fenced(line),
                stdin=_stdin(arguments.get("_stdin")),
                timeout=limit,
                on_output=lines.feed,
            )
        except QuietportError as error:
            return False, self._unanswered(lines, self._without_name(str(error)))
        except TimeoutError:
            sentence = (
                f"a command took longer than {limit} s and was ended. Look on the host at what it waits for "
                "(`ps -ef --forest`), then run again."
            )
            return False, self._unanswered(lines, sentence)
        wanted = arguments.get("_success_exit_codes") or (0,)
        succeeded = result.exit_code in wanted
        return succeeded, lines.finish(clean=not succeeded)

    @override
    def put_file(
        self,
        filename_or_io: str | IOBase,
        remote_filename: str,
        remote_temp_filename: str | None = None,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """Write a file at once: beside its place, private until it is whole, then renamed.

        Mode and owner of an existing file stay; a new one is root's, 0644. A symbolic link is followed.
        """
        with get_file_io(cast("str | IO[Any]", filename_or_io)) as stream:
            content = stream.read()
        data = content.encode() if isinstance(content, str) else content
        line = self._fenced(shlex.join(["sh", "-c", _PUT, "sh", remote_filename, str(len(data))]))
        done = self._live().run(line, stdin=data, timeout=arguments.get("_timeout") or None)
        return self._transferred("uploaded", remote_filename, done.exit_code, done.stderr, print_output)

    @override
    def get_file(
        self,
        remote_filename: str,
        filename_or_io: str | IOBase,
        remote_temp_filename: str | None = None,
        print_output: bool = False,
        print_input: bool = False,
        **arguments: Any,
    ) -> bool:
        """Read a file as root into a local file or stream."""
        done = self._live().run(
            shlex.join(["cat", "--", remote_filename]), timeout=arguments.get("_timeout") or None
        )
        if done.exit_code == 0:
            with get_file_io(cast("str | IO[Any]", filename_or_io), "wb") as stream:
                stream.write(done.stdout)
        return self._transferred("downloaded", remote_filename, done.exit_code, done.stderr, print_output)

    @override
    def check_can_rsync(self) -> None:
        """Raises NotImplementedError: rsync would go around the pinned keys and sudo."""
        raise NotImplementedError("rsync is not offered here; use files.put or files.sync.")

    def _unanswered(self, lines: _Lines, sentence: str) -> Unanswered:
        return Unanswered(self.host.name, lines.finish(clean=True), sentence)

    def _fenced(self, line: str) -> str:
        """`line`, run only while the lock is ours, once it was taken."""
        if self.lock is None:
            return line
        if not self.lock.held:
            # We were silent for too long, while a question waited for its answer, say.
            self.lock.move(self._live())
        return fenced(line)

    def _live(self) -> Session:
        if self.session is None:
            raise LinkLost(f"{self.host.name}: not connected.")
        return self.session

    def _without_name(self, sentence: str) -> str:
        return sentence.removeprefix(f"{self.host.name}: ")

    def _transferred(self, verb: str, path: str, exit_code: int, stderr: bytes, show: bool) -> bool:
        if exit_code != 0:
            logger.error(f"{self.host.print_prefix}{path} was not {verb}: {printable(_text(stderr)).strip()}")
        elif show:
            echo(f"{self.host.print_prefix}file {verb}: {path}", err=True)
        return exit_code == 0


def printable(text: str) -> str:
    """Text from a host without what a terminal would act on."""
    return "".join(
        char if char.isprintable() or char in "\t\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


class _Lines:
    """Output as pyinfra wants it: lines in the order they came, shown as they come when asked."""

    def __init__(self, prefix: str, *, show: bool) -> None:
        self._prefix = prefix
        self._show = show
        self._open: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self._lines: list[OutputLine] = []

    def feed(self, stream: str, piece: bytes) -> None:
        """Take a piece of one stream."""
        *whole, self._open[stream] = (self._open[stream] + piece).split(b"\n")
        for line in whole:
            self._add(stream, line)

    def finish(self, *, clean: bool) -> CommandOutput:
        """All lines. `clean` takes control characters out: pyinfra prints what a failed command said."""
        for stream, rest in self._open.items():
            if rest:
                self._add(stream, rest)
        self._open = {"stdout": b"", "stderr": b""}
        for line in self._lines:
            if clean or line.buffer_name == "stderr":
                line.line = printable(line.line)
        return CommandOutput(self._lines)

    def _add(self, stream: str, line: bytes) -> None:
        text = _text(line)
        self._lines.append(OutputLine(stream, text))
        if self._show:
            shown = printable(text)
            echo(self._prefix + (format_text(shown, "red") if stream == "stderr" else shown), err=True)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def _said(sentence: str) -> CommandOutput:
    return CommandOutput([OutputLine("stderr", sentence)])


def _as_user(line: str, user: str | None) -> str:
    """The command as another user. pyinfra knows a missing user by sudo's words."""
    if not user or user == "root":
        return line
    name = shlex.quote(user)
    run = shlex.join(["runuser", "-s", "/bin/sh", "-c", line, "--", user])
    return f"id -u -- {name} >/dev/null 2>&1 || {{ echo sudo: unknown user {name} >&2; exit 1; }}; {run}"


def _stdin(given: str | bytes | Secret | Iterable[str] | None) -> bytes | Secret | None:
    if given is None or isinstance(given, (bytes, Secret)):
        return given
    if isinstance(given, str):
        given = [given]
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in given).encode()
