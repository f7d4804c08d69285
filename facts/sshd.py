"""sshd: its files, what it makes of them, and whether the one that runs has read them."""

from __future__ import annotations

from typing import Any

from pyinfra.api.facts import FactBase
from typing_extensions import override

from facts.shell import decoded, one_host_at_most, quoted, sections, split
from quietport.times import SHOW_START, newest, properties, read_at, stale, started_at

MAX_CONFIG_BYTES = 1 << 20


class SshdFiles(FactBase[dict[str, str]]):
    """{path: text} of /etc/ssh/sshd_config and the *.conf files beside it; {} when there are none."""

    @override
    def command(self) -> str:
        # Only regular files: a FIFO would hang the reader.
        return sections(
            files="for file in /etc/ssh/sshd_config /etc/ssh/sshd_config.d/*.conf; do "
            '[ -f "$file" ] && printf "%s %s\\n" "$(printf %s "$file" | base64 -w0)" '
            f'"$(head -c {MAX_CONFIG_BYTES} "$file" | base64 -w0)"; done; true'
        )

    @override
    @staticmethod
    def default() -> dict[str, str]:
        return {}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, str]:
        files: dict[str, str] = {}
        for line in split(output, "files")["files"].text.splitlines():
            name, _, content = line.partition(" ")
            path = decoded(name, what="the name of a file of sshd")
            files[path] = decoded(content, what=path)
        return files


class SshdEffective(FactBase[dict[str, list[str]]]):
    """What `sshd -T -C` says for a login of `user` from `addr`: {keyword: [values]}, keywords in lower case.

    Match blocks count only with -C. {} when sshd is not installed; {"error": [lines]} when it refuses its
    configuration. Repeated keywords (listenaddress, hostkey) have several values.
    """

    @override
    def command(self, user: str, addr: str) -> str:
        connection = quoted([f"user={user},host={addr},addr={addr}"])
        return sections(
            installed="test -x /usr/sbin/sshd",
            effective=f"/usr/sbin/sshd -T -C {connection} 2>&1",
        )

    @override
    @staticmethod
    def default() -> dict[str, list[str]]:
        return {}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, list[str]]:
        parts = split(output, "installed", "effective")
        if parts["installed"].code != 0:
            return {}
        lines = [line.strip() for line in parts["effective"].text.splitlines() if line.strip()]
        if parts["effective"].code != 0:
            return {"error": lines or ["sshd -T failed without a word"]}
        found: dict[str, list[str]] = {}
        for line in lines:
            keyword, _, value = line.partition(" ")
            # Warnings share the stream ("... line 3: Deprecated option"): a keyword is letters and digits.
            if keyword.isalnum():
                found.setdefault(keyword.lower(), []).append(value.strip())
        return found


class SshdProcess(FactBase[dict[str, Any]]):
    """Whether the sshd of ssh.service runs what its files say.

    {running, pid, started_at, read_at: when it last read its files, by a start or a reload,
    newest_config_mtime (seconds since the epoch, or None), stale: it runs and read them before the files, or
    the directory (a file was removed), last changed}.
    """

    @override
    def command(self) -> str:
        return sections(
            process=f"{SHOW_START} -p ActiveEnterTimestamp -p StateChangeTimestamp ssh.service",
            mtimes="cd /etc/ssh && stat -L -c %.9Y sshd_config sshd_config.d sshd_config.d/*.conf",
            now="date +%s.%N",
        )

    @override
    @staticmethod
    def default() -> dict[str, Any]:
        unknown = dict.fromkeys(("pid", "started_at", "read_at", "newest_config_mtime"))
        return {"running": False, **unknown, "stale": False}

    @override
    @one_host_at_most
    def process(self, output: list[str]) -> dict[str, Any]:
        parts = split(output, "process", "mtimes", "now")
        shown = properties(parts["process"].text)
        pid = int(shown.get("MainPID") or 0)
        changed = newest(parts["mtimes"].text, now=float(parts["now"].text or 0))
        started = started_at(shown.get("ExecMainStartTimestamp", "")) if pid else None
        read = read_at(shown)
        return {
            "running": pid > 0,
            "pid": pid or None,
            "started_at": started,
            "read_at": read,
            "newest_config_mtime": changed,
            "stale": stale(read, changed),
        }
