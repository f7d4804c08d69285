"""Files of the snapshot: looked at, copied, put back. Only root writes where they are.

What is put back is a new file with the old content, renamed into place. On a full disk it is the copy itself,
linked and renamed, which needs no room; never both, since ufw rewrites its files in place and would change
the copy with them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quietport import opened
from quietport.guard.machine import GuardError, Machine

MAX_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STAGED = ".quietport-guard."


@dataclass(frozen=True)
class Entry:
    """What is at a path. `kind`: file, dir, link or other; `sense` is the digest of what is compared."""

    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    sha256: str = ""
    sense: str = ""
    target: str = ""
    copy: str = ""

    def same_as(self, other: Entry | None) -> bool:
        """Whether both are the same but for times, and for what `sense` leaves out."""
        return other is not None and self._key() == other._key()

    def _key(self) -> tuple[object, ...]:
        return self.kind, self.mode, self.uid, self.gid, self.sense, self.target

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in ("", 0)}


# What of a file's content counts in a comparison: (path, content) -> content.
Sense = Callable[[str, bytes], bytes]
# Given (path, content), keeps a copy and returns its name.
Keep = Callable[[str, bytes, os.stat_result], str]


def look(
    machine: Machine, paths: Iterable[str], *, sense: Sense, keep: Keep | None = None
) -> dict[str, Entry]:
    """What is at `paths` and below. `keep` is given every file's content. Raises GuardError or OSError."""
    found: dict[str, Entry] = {}
    size = 0
    for path in paths:
        for name in _below(machine, path):
            entry, length = _entry(machine, name, sense=sense, keep=keep)
            size += length
            if size > MAX_BYTES:
                raise GuardError(
                    f"{path} and what else a snapshot holds is larger than {MAX_BYTES >> 20} MiB: "
                    "something is there that does not belong there."
                )
            if entry is not None:
                found[name] = entry
    return found


def _below(machine: Machine, path: str) -> Iterator[str]:
    """`path` and, of a directory, everything below it, parents first. No link is followed."""
    yield path
    place = machine.path(path)
    if place.is_symlink() or not place.is_dir():
        return
    for child in sorted(place.iterdir()):
        if not child.name.startswith(_STAGED):
            yield from _below(machine, f"{path}/{child.name}")


def _entry(machine: Machine, path: str, *, sense: Sense, keep: Keep | None) -> tuple[Entry | None, int]:
    place = machine.path(path)
    try:
        status = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None, 0
    mode = stat.S_IMODE(status.st_mode)
    uid, gid = status.st_uid, status.st_gid
    if stat.S_ISLNK(status.st_mode):
        return Entry("link", uid=uid, gid=gid, target=str(place.readlink())), 0
    if stat.S_ISDIR(status.st_mode):
        return Entry("dir", mode, uid, gid), 0
    if not stat.S_ISREG(status.st_mode):
        return Entry("other", mode, uid, gid), 0
    data = read(place)
    copy = keep(path, data, status) if keep else ""
    return Entry(
        "file",
        mode,
        uid,
        gid,
        mtime_ns=status.st_mtime_ns,
        sha256=digest(data),
        sense=digest(sense(path, data)),
        copy=copy,
    ), len(data)


def read(place: Path) -> bytes:
    """The content of a regular file, no link followed. Raises OSError, or GuardError for a huge one."""
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise GuardError(f"{place} is larger than {MAX_BYTES >> 20} MiB.")
    return data


def digest(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()


def write(place: Path, data: bytes, *, mode: int, uid: int, gid: int, mtime_ns: int | None = None) -> None:
    """A new file, on the disk when this returns; nothing is left when it fails. Raises OSError."""
    with suppress(FileNotFoundError):
        place.unlink()
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            made = os.fstat(descriptor)
            if (made.st_uid, made.st_gid) != (uid, gid):
                os.fchown(descriptor, uid, gid)
            os.fchmod(descriptor, mode)
            if mtime_ns is not None:
                os.utime(descriptor, ns=(mtime_ns, mtime_ns))
            os.fsync(descriptor)
    except BaseException:
        place.unlink(missing_ok=True)
        raise


def sync_directory(place: Path) -> None:
    """What was renamed, made or removed in a directory is on the disk. Raises OSError."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Restorer:
    """Puts `old` back, from the copies in `copies`. What `adapt` makes of a file's content is written."""

    machine: Machine
    copies: Path
    old: Mapping[str, Entry]
    adapt: Sense
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.changed: list[str] = []
        self.problems: list[str] = []
        self._touched: set[Path] = set()

    def __call__(self, now: Mapping[str, Entry]) -> None:
        """Make `now` (what is there) into `old`; `changed` and `problems` tell what came of it.

        A power cut may fall between any two of these, and the boot after it may not get to repair them:
        what refuses to start a public sshd (our drop-in of its unit) goes before sshd's files turn public,
        and comes after they are private; what allows one (the note of `quietport open`) the other way round.
        """
        gone = [path for path in sorted(now, reverse=True) if path not in self.old]
        back = [path for path in sorted(self.old) if not self.old[path].same_as(now.get(path))]
        for kind, paths, action in (
            ("note", back, self._put_back),
            ("other", gone, self._remove),
            ("sshd", back, self._put_back),
            ("sshd", gone, self._remove),
            ("other", back, self._put_back),
            ("note", gone, self._remove),
        ):
            for path in (path for path in paths if _kind(path) == kind):
                self._try(path, action)
        for directory in sorted(self._touched):
            try:
                sync_directory(directory)
            except (FileNotFoundError, NotADirectoryError):
                continue  # removed since; its parent is among them
            except OSError as error:
                self.problems.append(f"{directory} cannot be synced: {error.strerror}")

    def _try(self, path: str, action: Callable[[str], str]) -> None:
        try:
            done = action(path)
        except (OSError, GuardError) as error:
            self.problems.append(f"{path} could not be put back: {error}")
            return
        if done:
            self.changed.append(path)
            self.say(f"{path} {done}")

    def _remove(self, path: str) -> str:
        place = self.machine.path(path)
        try:
            status = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        if stat.S_ISDIR(status.st_mode):
            self._clear_staged(place)
            place.rmdir()
        else:
            place.unlink()
        self._touched.add(place.parent)
        return "removed: it was not there"

    def _clear_staged(self, place: Path) -> None:
        for child in place.iterdir():
            if child.name.startswith(_STAGED):
                child.unlink()

    def _put_back(self, path: str) -> str:
        entry = self.old[path]
        place = self.machine.path(path)
        if entry.kind == "other":
            return ""
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._touched.add(place.parent)
        if entry.kind == "dir":
            self._directory(place, entry)
            return "put back as a directory"
        if place.is_dir() and not place.is_symlink():
            self._empty(place)
        staged = place.parent / f"{_STAGED}{place.name}"
        if entry.kind == "link":
            staged.unlink(missing_ok=True)
            staged.symlink_to(entry.target)
            if (entry.uid, entry.gid) != (os.geteuid(), os.getegid()):
                os.chown(staged, entry.uid, entry.gid, follow_symlinks=False)
        else:
            self._stage(path, entry, staged)
        staged.replace(place)
        return "put back"

    def _stage(self, path: str, entry: Entry, staged: Path) -> None:
        copy = self.copies / entry.copy
        data = read(copy)
        if digest(data) != entry.sha256:
            raise GuardError(f"its copy {copy} is damaged")
        try:
            write(
                staged,
                self.adapt(path, data),
                mode=entry.mode,
                uid=entry.uid,
                gid=entry.gid,
                mtime_ns=entry.mtime_ns,
            )
        except OSError as error:
            if error.errno not in _FULL:
                raise
            # The copy has owner, mode and time of the original already.
            staged.unlink(missing_ok=True)
            staged.hardlink_to(copy)

    def _directory(self, place: Path, entry: Entry) -> None:
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            place.unlink()
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
                os.fchown(descriptor, entry.uid, entry.gid)
            os.fchmod(descriptor, entry.mode)
        finally:
            os.close(descriptor)
        self._touched.add(place)

    def _empty(self, place: Path) -> None:
        """Remove a directory that stands where a file was, and what is in it."""
        for folder, directories, names in os.walk(place, topdown=False):
            for name in names:
                (Path(folder) / name).unlink()
            for name in directories:
                child = Path(folder) / name
                if child.is_symlink():
                    child.unlink()
                else:
                    child.rmdir()
        place.rmdir()


def _kind(path: str) -> str:
    if path == str(opened.OPENED):
        return "note"
    return "sshd" if path.startswith("/etc/ssh/") else "other"
