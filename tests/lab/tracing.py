"""What programs are told and what they write, seen at the moment it happens: strace, and what its lines say.

strace stops every process at each exec and each write, so none is too short-lived to be seen; polling
/proc would miss most. What it cannot see: writes through a memory map (systemd-journald's, which is read
afterwards), copies that a file system makes of whole files (FICLONE of XFS and btrfs), and what lies more
than STRING_BYTES into one write.

A canary is searched for by its random part, in which no character is ever quoted or escaped, whatever
the text around it needs. It is searched for in halves, and encoded.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

STRING_BYTES = 4096
ATTACH_TIMEOUT_S = 30
RETRY_S = 5.0
SEARCH_TIMEOUT_S = 300
EXECS = ("execve", "execveat")
WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2")
# From one file into another, without a byte in the trace.
COPIES = ("sendfile", "copy_file_range", "splice", "tee")
RENAMES = ("rename", "renameat", "renameat2", "link", "linkat")
MAKES = ("mkdir", "mkdirat")
MODES = ("chmod", "fchmod", "fchmodat", "fchmodat2")
NAMES = ("open", "openat", "openat2", "creat", "symlink", "symlinkat")
TRACED = (*EXECS, *WRITES, *COPIES, *RENAMES, *MAKES, *MODES, *NAMES)
# Calls that tell where bytes may go; the others matter only with a canary in them.
_ALWAYS = (*COPIES, *RENAMES, *MAKES, *MODES)
_PRIVATE_MODE = 0o700


# What is searched for


@dataclass(frozen=True)
class Canary:
    """Something that must not be seen, or a positive control that must be. Only its name is ever shown."""

    name: str
    core: str
    """Its random part: 24 letters, digits, - and _ or more."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{24,}", self.core):
            raise ValueError(f"{self.name}: a canary's core is 24 letters, digits, - and _ or more")

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def forms(self) -> tuple[str, ...]:
        """Texts that give it away: its halves, plain and in what programs encode bytes with."""
        half = len(self.core) // 2
        found: dict[str, None] = {}
        for piece in (self.core[:half], self.core[-half:]):
            data = piece.encode()
            found |= dict.fromkeys((piece, data.hex(), data.hex().upper()))
            found |= dict.fromkeys("".join(f"%{byte:{kind}}" for byte in data) for kind in ("02x", "02X"))
            for shift in range(3):
                text = _middle_of_base64(data, shift)
                found |= dict.fromkeys((text, text.replace("+", "-").replace("/", "_")))
        return tuple(found)

    def is_in(self, text: str | bytes) -> bool:
        """Whether any of its forms is."""
        if isinstance(text, bytes):
            return any(form.encode() in text for form in self.forms)
        return any(form in text for form in self.forms)


def _middle_of_base64(data: bytes, shift: int) -> str:
    """What base64 makes of `data` after `shift` other bytes, without the characters they share."""
    text = base64.b64encode(bytes(shift) + data).decode()
    first = -(-shift * 8 // 6)
    return text[first : (shift + len(data)) * 8 // 6]


@dataclass(frozen=True, order=True)
class Leak:
    """Where a canary was seen. `how` is argv, environment, written, copied, named, moved, kept or said."""

    canary: str
    how: str
    where: str


# strace's lines


@dataclass(frozen=True)
class Call:
    """One system call. `result` is None when the process was killed in it."""

    pid: int
    at: float
    name: str
    arguments: str
    result: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it did something; what nobody knows counts as done."""
        return self.result is None or not self.result.startswith("-1")


_CALL = re.compile(r"^(\d+)\s+(\d+\.\d+) (\w+)\((.*)$", re.DOTALL)
_RESUMED = re.compile(r"^(\d+)\s+\d+\.\d+ <\.\.\. (\w+) resumed>(.*)$", re.DOTALL)
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"^(.*)\)\s+= (.*)$", re.DOTALL)


def calls(lines: Iterable[str]) -> Iterator[Call]:
    """The system calls of `strace -f -ttt -o`, each when it ends; those cut in two are put together.

    A call that never ends (its process was killed) comes last.
    """
    begun: dict[int, Call] = {}
    for line in lines:
        line = line.rstrip("\n")
        if found := _RESUMED.match(line):
            pid = int(found[1])
            call = begun.pop(pid, None)
            if call is not None and call.name == found[2]:
                yield _ended(call.pid, call.at, call.name, call.arguments + found[3])
        elif found := _CALL.match(line):
            pid, at, name, rest = int(found[1]), float(found[2]), found[3], found[4]
            if rest.endswith(_UNFINISHED):
                begun[pid] = Call(pid, at, name, rest.removesuffix(_UNFINISHED))
            else:
                yield _ended(pid, at, name, rest)
    yield from begun.values()


def _ended(pid: int, at: float, name: str, rest: str) -> Call:
    found = _RESULT.match(rest)
    return Call(pid, at, name, found[1], found[2]) if found else Call(pid, at, name, rest)


_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "v": "\v", "f": "\f", "a": "\a", "b": "\b"}


def unescaped(text: str) -> str:
    """A string of strace's as it was, one character a byte; -x and -xx write bytes as \\xNN."""

    def char(found: re.Match[str]) -> str:
        code = found[1]
        if code[0] == "x" and len(code) == 3:
            return chr(int(code[1:], 16))
        if code[0] in "01234567":
            return chr(int(code, 8) & 0xFF)
        return _NAMED.get(code, code)

    return _ESCAPE.sub(char, text)


def strings(arguments: str) -> list[str]:
    """Every string among a call's arguments, unescaped."""
    return [unescaped(found[1]) for found in _STRING.finditer(arguments)]


def argv_and_environment(arguments: str) -> tuple[list[str], list[str]]:
    """What an exec hands over, as `strace -v` shows it: `"/bin/x", ["x", "-l"], ["HOME=/root"]`.

    What cannot be read (a pointer) is empty.
    """
    lists: list[list[str]] = []
    at = 0
    while (start := _outside_strings(arguments, "[", at)) >= 0:
        end = _outside_strings(arguments, "]", start)
        end = len(arguments) if end < 0 else end
        lists.append(strings(arguments[start:end]))
        at = end
    lists += [[], []]
    return lists[0], lists[1]


def _outside_strings(text: str, char: str, at: int) -> int:
    """Where `char` is first outside of a string, from `at` on; -1 when it is not."""
    token = re.compile(rf'"(?:[^"\\]|\\.)*"|{re.escape(char)}', re.DOTALL)
    for found in token.finditer(text, at):
        if found[0] == char:
            return found.start()
    return -1


_FD = re.compile(r"(?:\d+|AT_FDCWD)<((?:[^<>\\]|\\.|->)*)>(\(deleted\))?")


def descriptors(arguments: str) -> list[str]:
    """What the file descriptors among the arguments are, as `strace -y` names them: a path, `pipe:[7]`."""
    bare = _STRING.sub('""', arguments)
    return [unescaped(found[1]).removesuffix(" (deleted)") for found in _FD.finditer(bare)]


def paths(call: Call) -> list[str]:
    """The paths a call names, in order. One that is relative to a directory shown beside it is made whole."""
    found = []
    tokens = re.compile(rf"{_FD.pattern}|{_STRING.pattern}", re.DOTALL)
    folder = ""
    for token in tokens.finditer(call.arguments):
        if token[3] is None:
            folder = unescaped(token[1]).removesuffix(" (deleted)")
            continue
        path = unescaped(token[3])
        found.append(path if path.startswith("/") or not folder else str(PurePosixPath(folder) / path))
        folder = ""
    return found


# Deciding


@dataclass
class Places:
    """Which directories nobody but their owner can enter, as the trace tells it from its beginning."""

    expected: Collection[str] = ()
    """Directories that will be made private by a relative name, as `install -d` does it."""
    private: set[str] = field(default_factory=set)

    def note(self, call: Call) -> None:
        """Learn from a call that made a directory or changed a mode."""
        if not call.succeeded:
            return
        mode = _mode_of(call)
        named = paths(call) or descriptors(call.arguments)
        if mode is None or not named:
            return
        where = {named[0], *(path for path in self.expected if PurePosixPath(path).name == named[0])}
        if mode & 0o077:
            self.private -= where
        else:
            self.private |= where

    def protects(self, path: str) -> bool:
        """Whether a file at `path` is out of everybody else's reach."""
        return any(str(folder) in self.private for folder in PurePosixPath(path).parents)


def _mode_of(call: Call) -> int | None:
    """The mode a mkdir or chmod names."""
    found = re.search(r", 0([0-7]{3,4})(?:,|$)", call.arguments)
    return int(found[1], 8) if found and call.name in (*MAKES, *MODES) else None


# Nothing that lasts and nothing that others can open.
_NO_FILE = re.compile(r"^(?:pipe:|socket:|anon_inode:|UNIX|TCP|UDP|/memfd:|/dev/null$)")


def is_no_file(place: str) -> bool:
    """Whether a descriptor is a pipe or a socket, whose other end was chosen by who opened it."""
    return _NO_FILE.match(place) is not None


def leaks(
    found: Iterable[Call],
    canaries: Sequence[Canary],
    *,
    launched: str = "",
    folders: Collection[str] = (),
) -> list[Leak]:
    """What a trace gives away, in the order of its calls.

    A canary may be in no program's arguments or environment and in no file's name. It may be written to a
    pipe or a socket, and to a file below a directory that was made 0700 in this trace; never to any other
    file, nor may a file that has it be copied, moved or linked out of there. `launched` is a program whose
    first exec of the trace was the operator's own: that environment is where the operator put it.
    `folders` are where files with secrets belong; they too must have been made 0700 first.
    """
    places = Places(folders)
    holding: dict[str, set[str]] = {}
    out: list[Leak] = []
    for call in found:
        seen = [canary for canary in canaries if canary.is_in(unescaped(call.arguments))]
        if call.name in EXECS:
            mine = bool(launched) and launched in call.arguments
            out += _in_exec(call, seen, environment=not mine)
            launched = "" if mine else launched
        elif call.name in WRITES:
            out += _in_write(call, seen, places, holding)
        else:
            where = ", ".join(paths(call))
            out += [Leak(canary.name, "named", f"{call.name} {where}") for canary in seen]
            places.note(call)
            if call.name in COPIES:
                out += _in_copy(call, places, holding)
            elif call.name in RENAMES:
                out += _in_rename(call, places, holding)
    return out


def _in_exec(call: Call, seen: Sequence[Canary], *, environment: bool) -> list[Leak]:
    argv, variables = argv_and_environment(call.arguments)
    program = (strings(call.arguments) or ["?"])[0]
    out = []
    for canary in seen:
        in_variables = [text.partition("=")[0] for text in variables if canary.is_in(text)]
        in_argv = any(canary.is_in(text) for text in argv)
        if in_argv or not in_variables:
            out.append(Leak(canary.name, "argv", program))
        if environment:
            out += [Leak(canary.name, "environment", f"{name} of {program}") for name in in_variables]
    return out


def _in_write(call: Call, seen: Sequence[Canary], places: Places, holding: dict[str, set[str]]) -> list[Leak]:
    if not seen:
        return []
    place = (descriptors(call.arguments) or ["?"])[0]
    if is_no_file(place):
        return []
    holding.setdefault(place, set()).update(canary.name for canary in seen)
    if places.protects(place):
        return []
    return [Leak(canary.name, "written", place) for canary in seen]


def _in_copy(call: Call, places: Places, holding: dict[str, set[str]]) -> list[Leak]:
    ends = descriptors(call.arguments)
    if len(ends) < 2 or not call.succeeded:
        return []
    # sendfile(2) names the destination first.
    into, source = ends[:2] if call.name == "sendfile" else ends[1::-1]
    names = holding.get(source, set())
    if not names or is_no_file(into):
        return []
    holding.setdefault(into, set()).update(names)
    return [] if places.protects(into) else [Leak(name, "copied", into) for name in sorted(names)]


def _in_rename(call: Call, places: Places, holding: dict[str, set[str]]) -> list[Leak]:
    ends = paths(call)
    if len(ends) < 2 or not call.succeeded:
        return []
    source, into = ends[:2]
    # A directory takes what is in it along.
    moved = {path: names for path, names in holding.items() if _is_or_in(path, source)}
    out = []
    for path, names in moved.items():
        place = into + path[path.index(source) + len(source) :]
        holding.setdefault(place, set()).update(names)
        if not places.protects(place):
            out += [Leak(name, "moved", place) for name in sorted(names)]
    return out


def _is_or_in(path: str, source: str) -> bool:
    """Whether `path` is `source` or below it; relative to a directory nobody knows, it may be any."""
    if not source.startswith("/"):
        source, path = f"/{source}", f"/{path}"
        return path.endswith(source) or f"{source}/" in path
    return path == source or path.startswith(f"{source}/")


# Running strace


def strace(output: Path) -> list[str]:
    """The options both kinds of traces share."""
    return [
        "strace",
        "--follow-forks",
        "--absolute-timestamps=format:unix,precision:us",
        "--no-abbrev",
        "--decode-fds=path",
        f"--string-limit={STRING_BYTES}",
        "--quiet=all",
        "--signal=none",
        f"--trace={','.join(f'?{name}' for name in TRACED)}",
        f"--output={output}",
    ]


def around(output: Path) -> list[str]:
    """What is put before a command so that it and all it starts are traced; it stays our own child.

    Its standard output ends when the trace is whole. sudo does not work in there: the kernel's filter,
    which makes this quick, takes set-user-ID away.
    """
    return [*strace(output), "--seccomp-bpf", "--daemonize"]


@contextlib.contextmanager
def inside(init: int, output: Path) -> Iterator[list[Path]]:
    """Trace every process of the PID namespace that process `init` begins, and all they start.

    Yields the files the trace goes to; they are whole after the block. The block begins when no thread is
    left untraced, and every later one is the child of a traced one. Raises TimeoutError.
    """
    tracers: list[subprocess.Popen[bytes]] = []
    files: list[Path] = []
    asked: dict[int, float] = {}
    end = time.monotonic() + ATTACH_TIMEOUT_S
    try:
        while left := untraced(init):
            now = time.monotonic()
            if now > end:
                raise TimeoutError(f"strace did not get hold of {sorted(left)} in {ATTACH_TIMEOUT_S} s")
            # Those that came while the first ones were attached, and those it did not get.
            new = [pid for pid in sorted(left) if now - asked.get(pid, -RETRY_S) >= RETRY_S]
            if new:
                asked |= dict.fromkeys(new, now)
                files.append(output.with_name(f"{output.name}.{len(files)}"))
                argv = [*strace(files[-1]), *(f"--attach={pid}" for pid in new)]
                tracers.append(subprocess.Popen(argv, stderr=subprocess.DEVNULL))
            time.sleep(0.1)
        yield files
    finally:
        for tracer in tracers:
            # It lets go of every process, and they go on as before.
            tracer.send_signal(signal.SIGTERM)
        for tracer in tracers:
            tracer.wait(ATTACH_TIMEOUT_S)


def untraced(init: int) -> set[int]:
    """Processes of that PID namespace with a thread that nobody traces."""
    namespace = Path(f"/proc/{init}/ns/pid").readlink()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        # What ends while it is looked at needs no tracer.
        with contextlib.suppress(OSError):
            if (entry / "ns/pid").readlink() == namespace and any(map(_is_free, (entry / "task").iterdir())):
                found.add(int(entry.name))
    return found


def _is_free(task: Path) -> bool:
    """Whether nobody traces a thread that lives."""
    try:
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
    except OSError:
        return False
    return status["State"].strip()[0] not in "ZX" and int(status["TracerPid"]) == 0


# Searching


def search_trace(
    files: Sequence[Path],
    canaries: Sequence[Canary],
    *,
    launched: str = "",
    folders: Collection[str] = (),
) -> list[Leak]:
    """What the traces in these files give away; see `leaks`. They may be large: grep picks the lines."""
    picked: dict[tuple[int, int], str] = {}
    # Both halves of a call that was cut in two, whatever it is about.
    pattern = rf"^[0-9]+ +[0-9.]+ (({'|'.join(_ALWAYS)})\(|<\.\.\. [a-z0-9_]+ resumed>)"
    for index, file in enumerate(files):
        for options, words in ((["-E"], [pattern]), (["-F"], _forms_of(canaries))):
            picked |= {(index, number): line for number, line in _grep(file, options, words)}
    lines = [picked[key] for key in sorted(picked)]
    # Their time puts lines of several files in order; within one file they are in order already.
    if len(files) > 1:
        lines.sort(key=_time_of)
    return leaks(calls(lines), canaries, launched=launched, folders=folders)


_BYTES: Mapping[str, str] = {"LC_ALL": "C", "PATH": os.environ.get("PATH", "")}


def _grep(file: Path, options: Sequence[str], patterns: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Numbered lines that match. Patterns come by standard input: a search must not show what it is for."""
    done = subprocess.run(
        ["grep", "--text", "--line-number", *options, "-f", "-", "--", str(file)],
        input="\n".join(patterns).encode(),
        capture_output=True,
        env=_BYTES,
        timeout=SEARCH_TIMEOUT_S,
        check=False,
    )
    if done.returncode > 1:
        raise RuntimeError(f"grep in {file}: {done.stderr.decode(errors='replace')}")
    for line in done.stdout.decode("latin-1").split("\n"):
        number, colon, text = line.partition(":")
        if colon:
            yield int(number), text


def _forms_of(canaries: Sequence[Canary]) -> list[str]:
    return [form for canary in canaries for form in canary.forms]


def _time_of(line: str) -> float:
    return float(line.split(None, 2)[1])


def carried(files: Sequence[Path], canaries: Iterable[Canary]) -> set[str]:
    """The names of the canaries that are anywhere in the traces, be it where they may be."""
    return {
        canary.name
        for canary in canaries
        if any(next(_grep(file, ["-F"], canary.forms), None) is not None for file in files)
    }


def execs(files: Sequence[Path]) -> int:
    """How many programs the traces saw begin."""
    return sum(1 for file in files for _ in _grep(file, ["-E"], ["^[0-9]+ +[0-9.]+ exec"]))


def search_files(
    roots: Iterable[Path], canaries: Sequence[Canary], *, allowed: Collection[Path] = ()
) -> list[Leak]:
    """Every regular file below `roots` that has a canary, or is named by one, but for the allowed files."""
    there = [str(root) for root in roots if root.exists()]
    if not there:
        raise ValueError("nothing to search")
    forms = "\n".join(_forms_of(canaries))
    argv = ["grep", "-rlaF", "--devices=skip", "--null", "--no-messages", "-f", "-", "--", *there]
    done = subprocess.run(
        argv, input=forms.encode(), capture_output=True, env=_BYTES, timeout=SEARCH_TIMEOUT_S, check=False
    )
    out = []
    for name in filter(None, done.stdout.split(b"\0")):
        path = Path(os.fsdecode(name))
        if path not in allowed:
            data = path.read_bytes()
            out += [Leak(canary.name, "kept", str(path)) for canary in canaries if canary.is_in(data)]
    return sorted(out)


def search_text(where: str, text: str, canaries: Sequence[Canary]) -> list[Leak]:
    """The canaries that something said."""
    return [Leak(canary.name, "said", where) for canary in canaries if canary.is_in(text)]
