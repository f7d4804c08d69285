"""One sentence from what apt, dpkg and the fetching of a key said when they failed.

The words are apt's (apt-pkg/acquire-item.cc, apt-pkg/deb/debmetaindex.cc, methods/connect.cc of 2.6 and 3.0)
and curl's; apt-get writes `E:` and `W:`, apt 3.0 for people `Error:` and `Warning:`.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from operations.common import no_room

AGAIN = "then run again."
_FETCH = re.compile(r"^(?:E|W|Error|Warning): Failed to fetch (?P<url>\S+)\s+(?P<why>.*)$", re.MULTILINE)
_EXPIRED = re.compile(
    r"^(?:E|W|Error|Warning): Release file for (?P<url>\S+) is expired \(invalid since (?P<since>[^)]*)\)",
    re.MULTILINE,
)
_TOO_NEW = re.compile(
    r"Release file for (?P<url>\S+) is not valid yet \(invalid for another (?P<left>[^)]*)\)"
)
_UNSIGNED = re.compile(
    r"GPG error: (?P<url>\S+)[^:]*: (?P<why>.*)$"
    r"|^(?:E|Error): The repository '(?P<name>\S+)[^']*' is not signed",
    re.MULTILINE,
)
_NO_RELEASE = re.compile(r"The repository '(?P<url>\S+) (?P<suite>\S+) Release' does not have a Release file")
_UNKNOWN = re.compile(
    r"Unable to locate package (?P<one>\S+)|Package '?(?P<two>[^' ]+)'? has no installation candidate"
)
_KEY = re.compile(r"cannot fetch the signing key from (?P<url>[^\s;]+)")
_CURL = re.compile(r"^curl: \(\d+\) (?P<why>.*)$", re.MULTILINE)
_DPKG = re.compile(r"^dpkg: error (?P<why>.*)$", re.MULTILINE)
_STATUS = re.compile(r"(?:^|error: )(?P<code>[1-5]\d\d)\b *(?P<words>[^\[]*)")


def why(said: str) -> str | None:
    """Why it failed and what to do, as one sentence; None when it is not known."""
    return no_room(said) or _of_the_key(said) or _of_trust(said) or _of_fetching(said) or _of_packages(said)


def repository(url: str) -> str:
    """The repository a file of it belongs to: what stands in sources.list."""
    return re.split(r"/(?:dists|pool)/", url, maxsplit=1)[0].rstrip("/")


def _of_the_key(said: str) -> str | None:
    key = _KEY.search(said)
    if key is None:
        return None
    curl = list(_CURL.finditer(said))
    reason = _reason(curl[-1]["why"], key["url"]) if curl else "it cannot be read"
    return f"the signing key {key['url']} cannot be fetched: {reason}. {_look(key['url'])}"


def _of_trust(said: str) -> str | None:
    if expired := _EXPIRED.search(said):
        return (
            f"the repository {repository(expired['url'])} is out of date: its Release file expired "
            f"{expired['since']} ago, and nothing from it is trusted. Have it brought up to date, or "
            f"mend the host's clock (`date` there), {AGAIN}"
        )
    if new := _TOO_NEW.search(said):
        return (
            f"the repository {repository(new['url'])} is from the future by {new['left']}: the host's clock "
            f"is wrong. Mend it (`timedatectl` there), {AGAIN}"
        )
    hashes = [found for found in _FETCH.finditer(said) if _is_wrong_content(found["why"])]
    if hashes:
        url = hashes[0]["url"]
        return (
            f"{url.rpartition('/')[2]} of the repository {repository(url)} has another hash than its signed "
            "index says: it is not used. The repository is just being changed, or someone changes what it "
            f"sends. Look into it, or wait some minutes, {AGAIN}"
        )
    if unsigned := _UNSIGNED.search(said):
        url = repository(unsigned["url"] or unsigned["name"])
        detail = f" ({unsigned['why'].strip()[:200]})" if unsigned["why"] else ""
        return (
            f"the repository {url} is not signed by its pinned key{detail}: nothing from it is used. Look "
            f"whether its address is right, {AGAIN}"
        )
    return None


def _is_wrong_content(reason: str) -> bool:
    return "Hash Sum mismatch" in reason or "unexpected size" in reason


def _of_fetching(said: str) -> str | None:
    failed = list(_FETCH.finditer(said))
    if failed:
        # The first: what comes after it may follow from it.
        url, reason = failed[0]["url"], failed[0]["why"]
        return f"the repository {repository(url)} cannot be read: {_reason(reason, url)}. {_look(url)}"
    if bare := _NO_RELEASE.search(said):
        return (
            f"the repository {bare['url']} has no Release file for {bare['suite']}"
            f"{f' ({status})' if (status := _answer(said)) else ''}. {_look(bare['url'])}"
        )
    return None


def _answer(said: str) -> str:
    """The server's answer below apt's `Err:` line."""
    found = re.search(r"^Err:.*\n\s+(?P<code>[1-5]\d\d)\s+(?P<words>[^\[\n]*)", said, re.MULTILINE)
    return f"{found['code']} {found['words'].strip()}" if found else ""


def _look(url: str) -> str:
    host = urlsplit(url).hostname or "its server"
    return f"Look whether {host} is up and the address right, {AGAIN}"


def _reason(words: str, url: str) -> str:
    """The server's or the network's answer, as the second half of a sentence."""
    text = words.strip().rstrip(".")
    low = text.lower()
    host = urlsplit(url).hostname or "its server"
    # "Connection failed": it was connected, and nothing came (methods/basehttp.cc).
    if any(part in low for part in ("timed out", "too slow", "timeout", "connection failed")):
        return f"{host} gives no answer"
    if "resolv" in low:
        return f"the name {host} cannot be resolved"
    if status := _STATUS.search(text):
        said = " ".join(status["words"].split())
        name = urlsplit(url).path.rpartition("/")[2]
        return f"{host} answers {' '.join(filter(None, (status['code'], said)))} for {name}"
    return text.partition(" [IP:")[0][:200] or "it says nothing about why"


def _of_packages(said: str) -> str | None:
    if unknown := _UNKNOWN.search(said):
        name = unknown["one"] or unknown["two"]
        return (
            f"apt finds no package {name} in the host's repositories. "
            f"Compare /etc/apt/sources.list and sources.list.d there with its Debian's, {AGAIN}"
        )
    if failed := _DPKG.search(said):
        return (
            f"dpkg failed ({failed['why'].strip()[:200]}). What it said is above; repair it there "
            f"(`dpkg --configure -a`), {AGAIN}"
        )
    return None
