"""One path: what it is, and its text."""

from __future__ import annotations

import stat
from typing import Any

from pyinfra.api.exceptions import FactProcessError
from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import decoded, one_host_at_most, quoted, sections, split

MAX_TEXT_BYTES = 1 << 20


class FileState(FactBase[dict[str, Any]]):
    """{kind: file|directory|link|absent|other, mode: "0600", user, group, sha256, size, target}.

    Links are not followed; mode, user and group are None when absent, sha256 and size for anything but a
    file, target for anything but a link. A user or group without a name is its number.
    """

    @override
    def command(self, path: str) -> str:
        word = quoted([path])
        return sections(
            stat=f"LC_ALL=C stat --printf '%f %u %g %s\\n%U\\n%G\\n' -- {word}",
            present=f"test -e {word} || test -L {word}",
            # -f follows links: without the second test the link's target would be read.
            sha256=f"test -f {word} && ! test -L {word} && sha256sum -b < {word}",
            target=f"readlink -n -- {word} | base64 -w0",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        return _state("absent")

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, "stat", "present", "sha256", "target")
        if parts["stat"].code != 0:
            if parts["present"].code == 0:
                raise FactProcessError("a file is there but cannot be examined")
            return _state("absent")
        numbers, user, group = parts["stat"].text.splitlines()[:3]
        raw, uid, gid, size = numbers.split()
        mode = int(raw, 16)
        kind = _kind(mode)
        if kind == "file" and parts["sha256"].code != 0:
            raise FactProcessError("a file is there but cannot be read")
        return _state(
            kind,
            mode=f"{stat.S_IMODE(mode):04o}",
            user=uid if user == "UNKNOWN" else user,
            group=gid if group == "UNKNOWN" else group,
            sha256=parts["sha256"].text.split()[0] if kind == "file" else None,
            size=int(size) if kind == "file" else None,
            target=decoded(parts["target"].text, what="a link's target") if kind == "link" else None,
        )


class FileText(FactBase[str | None]):
    """The text of a regular file of at most 1 MiB (bytes that are not UTF-8 as replacement characters).

    None when nothing is there. Anything else that is there fails the host: it is never taken for absent.
    """

    @override
    def command(self, path: str) -> str:
        word = quoted([path])
        return sections(
            present=f"test -e {word} || test -L {word}",
            text=f"test -f {word} && head -c {MAX_TEXT_BYTES + 1} -- {word} | base64 -w0",
        )

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> str | None:
        parts = split(output, "present", "text")
        if parts["present"].code != 0:
            return None
        if parts["text"].code != 0:
            raise FactProcessError("a path is there but is not a file that can be read")
        if len(parts["text"].text) * 3 // 4 > MAX_TEXT_BYTES:
            raise FactProcessError(f"a file is larger than {MAX_TEXT_BYTES} bytes")
        return decoded(parts["text"].text, what="the file")


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "other"


def _state(kind: str, **known: Any) -> dict[str, Any]:
    return {"kind": kind} | dict.fromkeys(("mode", "user", "group", "sha256", "size", "target")) | known
