"""Packages and signed repositories: waits for apt, repairs it, trusts no key before it is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyinfra.api.command import StringCommand
from pyinfra.context import host

from facts.apt import Keyring, Sources
from facts.files import FileState
from facts.packages import Packages
from facts.system import System
from operations import aptwait, aptwhy, notes
from operations.common import Commands, operation, refuse, script, warn
from operations.files import loosened, put_if_needed
from operations.units import enable_if_needed

WAIT_S = 900
# Above the wait for locks: an upgrade of the lists and a download over a slow link.
INSTALL_TIMEOUT_S = WAIT_S + 1800
HEADER = "# Written by quietport: changes here are overwritten by the next converge.\n"

# $1 is the time to wait, the waiter comes on standard input; apt must not read from there.
_PREPARE = """set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
wait_s=$1; shift
waiter=$(cat)
exec </dev/null
stamp=/run/quietport-apt-updated
# Seconds without a byte, for connecting too. A server that says nothing is given up after four times that
# (ran): apt itself asks twice on each of its tries.
limits='-o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15'
# Without python3 a host has neither unattended-upgrades nor cloud-init, which are written in it.
wait_for_apt() { ! command -v python3 >/dev/null || python3 -I -c "$waiter" "$wait_s"; }
# Runs a command of apt or dpkg. Another one may come between the wait and it, and lists/lock, archives/lock
# and dpkg have no timeout of their own: for that reason, and no other, it is tried again.
alone() {
  for try in 1 2 3 4 5; do
    wait_for_apt || exit 1
    if said=$("$@" 2>&1); then printf '%s\n' "$said"; return 0; fi
    case "$said" in *'get lock'*|*'Unable to lock'*|*'locked by another process'*) sleep 2 ;; *) break ;; esac
  done
  printf '%s\n' "$said" >&2
  return 1
}
get() {
  alone apt-get install -y -q --no-install-recommends $limits -o DPkg::Lock::Timeout="$wait_s" \
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"
}
# A repository that is just being changed is whole again soon; one that says nothing was asked often enough.
update() {
  if alone apt-get -q update $limits "$@"; then return 0; fi
  case "$said" in *'imed out'*|*'Connection failed'*) return 1 ;; esac
  sleep 5
  alone apt-get -q update $limits "$@"
}
unfinished() {
  dpkg-query -W -f '${db:Status-Status} ${binary:Package}\n' |
    sed -nE 's/^(half-installed|unpacked|half-configured|triggers-awaited|triggers-pending) //p' | xargs
}
# Always: `dpkg --audit` does not see the journal an interrupted dpkg leaves, on which apt-get fails (ran).
# dpkg alone does not finish what was unpacked before what it depends on; apt fetches that.
repair() {
  if alone dpkg --configure -a --force-confdef --force-confold && [ -z "$(unfinished)" ]; then return 0; fi
  get --fix-broken --no-remove || { update && get --fix-broken --no-remove; } || true
  left=$(unfinished)
  if [ -z "$left" ]; then return 0; fi
  echo "dpkg was interrupted, and neither 'dpkg --configure -a' nor 'apt-get --fix-broken install'" \\
    "repairs it. Repair by hand: $left" >&2
  exit 1
}
wait_for_apt
repair
"""

_INSTALL = (
    _PREPARE
    + """fresh=$(find "$stamp" -mmin -1440 2>/dev/null || true)
for name in "$@"; do
  candidate=$(apt-cache policy -- "$name" | sed -n 's/^  Candidate: //p')
  case "$candidate" in ''|'(none)') fresh= ;; esac
done
if [ -z "$fresh" ]; then
  update
  touch "$stamp"
  get -- "$@"
else
  # Lists of today may name a version that the mirror has replaced since.
  get -- "$@" || { update; get -- "$@"; }
fi
"""
)

_UPDATE_ONE = (
    _PREPARE
    + """update --error-on=any -o APT::Get::List-Cleanup=0 \\
  -o Dir::Etc::sourcelist="$1" -o Dir::Etc::sourceparts=-
"""
)

# The key is fetched into a private directory and looked at before it is anywhere apt reads.
_KEY = """set -eu
umask 077
url=$1; wanted=$2; path=$3; mistrust=$4
work=$(mktemp -d /run/quietport-key.XXXXXXXXXX)
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM PIPE
curl --fail --silent --show-error --location --proto '=https,http' --max-filesize 1048576 --retry 2 \\
  --connect-timeout 15 --speed-limit 1 --speed-time 15 --max-time 120 --output "$work/fetched" -- "$url" || {
    echo "cannot fetch the signing key from $url; what curl said is above." >&2
    exit 1
  }
quiet_gpg() { gpg --batch --quiet --no-options --homedir "$work" "$@"; }
if grep -q -e '-----BEGIN PGP' "$work/fetched"; then
  quiet_gpg --output "$work/key" --dearmor "$work/fetched"
else
  cp -- "$work/fetched" "$work/key"
fi
found=$(quiet_gpg --show-keys --with-colons "$work/key" |
  awk -F: '$1 == "pub" { primary = 1 } $1 == "fpr" && primary { print $10; primary = 0 }')
if [ "$found" != "$wanted" ]; then
  printf '%s\\n' "refused: $mistrust" | sed "s/FOUND/$(echo ${found:-none})/" >&2
  exit 1
fi
install -d -m 0755 -- "$(dirname -- "$path")"
install -m 0644 -o root -g root -- "$work/key" "$path.quietport-new"
sync -- "$path.quietport-new"
mv -fT -- "$path.quietport-new" "$path"
"""

# sed keeps the file's mode and owner, and puts the new one in its place by a rename.
_COMMENT_OUT = 'sed -i -- "$2,$3s/^/$4/" "$1"'
MARK = "# quietport: "


@dataclass(frozen=True)
class Repository:
    """A signed apt repository and the only packages that may come from it.

    `fingerprint` is the 40 hex digits of the one primary key its keyring may hold. `name` begins the names
    of the settings it comes from.
    """

    name: str
    uri: str
    suite: str
    components: tuple[str, ...]
    key_url: str
    fingerprint: str
    packages: tuple[str, ...]

    @property
    def site(self) -> str:
        """Host of the address: what apt calls the origin, and no repository can claim another's."""
        return urlsplit(self.uri).hostname or ""

    @property
    def keyring(self) -> str:
        return f"/etc/apt/keyrings/{self.name}.gpg"

    def mistrust(self, found: str) -> str:
        """Why a key with another fingerprint is not taken."""
        return (
            f"the key at {self.key_url} has the fingerprint {found}, and {self.name}_key_fingerprint says "
            f"{self.fingerprint}: not trusted. Compare with what upstream publishes, then correct "
            f"{self.name}_repository or {self.name}_key_fingerprint."
        )

    @property
    def sources_path(self) -> str:
        return f"/etc/apt/sources.list.d/{self.name}.sources"

    @property
    def preferences_path(self) -> str:
        return f"/etc/apt/preferences.d/quietport-{self.name}"

    def sources(self) -> str:
        """The source in deb822 form (sources.list(5)), bound to its own keyring."""
        return (
            f"{HEADER}Types: deb\nURIs: {self.uri}\nSuites: {self.suite}\n"
            f"Components: {' '.join(self.components)}\nSigned-By: {self.keyring}\n"
        )

    def preferences(self) -> str:
        """Nothing of the repository but its packages (apt_preferences(5): a named package beats `*`)."""
        pin = f'Pin: origin "{self.site}"'
        return (
            f"{HEADER}Package: *\n{pin}\nPin-Priority: -1\n\n"
            f"Package: {' '.join(self.packages)}\n{pin}\nPin-Priority: 500\n"
        )


def waiter() -> bytes:
    """The program that waits for apt on the host."""
    return Path(aptwait.__file__).read_bytes()


def _apt(text: str, *args: str) -> StringCommand:
    return script(
        text, str(WAIT_S), *args, stdin=waiter(), timeout=INSTALL_TIMEOUT_S, why=aptwhy.why
    )


@operation()
def wait_ready() -> Commands:
    """apt is free: cloud-init done, no lock held, dpkg not interrupted. Waits WAIT_S seconds at most."""
    system = host.get_fact(System)
    reasons = [
        f"{lock['path']} is held by {lock['process']} (pid {lock['pid']})" for lock in system["apt_locks"]
    ]
    if system["cloud_init"] == "running":
        reasons.append("cloud-init is still running")
    if system["dpkg_interrupted"]:
        reasons.append("dpkg was interrupted")
    if not reasons:
        host.noop("apt is free")
        return
    notes.because(*reasons)
    if not system["dpkg_interrupted"]:
        notes.leaves_host()
    warn(f"apt is not ready, which is waited for or repaired: {'; '.join(reasons)}.")
    yield _apt(_PREPARE)


def missing(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that are not installed on the host."""
    installed = host.get_fact(Packages, names=list(names))
    return tuple(name for name in names if not installed.get(name))


def install(names: tuple[str, ...]) -> StringCommand:
    """The command that installs: waits for apt, repairs an interrupted dpkg, updates old lists."""
    return _apt(_INSTALL, *names)


@operation()
def packages(names: tuple[str, ...]) -> Commands:
    """The packages are installed; those that are stay at their version."""
    absent = missing(tuple(names))
    if not absent:
        host.noop("all are installed")
        return
    notes.because(*(f"{name} is not installed" for name in absent))
    yield install(absent)


@operation()
def scheduled(timers: tuple[str, ...]) -> Commands:
    """apt's own timers, which fetch lists and install upgrades, are enabled and run."""
    changed = False
    for timer in timers:
        for command in enable_if_needed(timer):
            changed = True
            yield command
    if not changed:
        host.noop("apt's timers run")


def rivals(sources: list[dict[str, Any]], repository: Repository) -> list[dict[str, Any]]:
    """Sources in other files that name the very repository, as its upstream's own instructions make them.

    apt reads no source at all while two entries for one address and suite name different keyrings:
    "Conflicting values set for option Signed-By" (apt 2.6 and 3.0, ran).
    """
    same = repository.uri.rstrip("/")
    return [
        source
        for source in sources
        if source["path"] != repository.sources_path
        and same in (uri.rstrip("/") for uri in source["uris"])
        and repository.suite in (suite.rstrip("/") for suite in source["suites"])
    ]


@operation()
def repository(repository: Repository) -> Commands:
    """A signed repository is known to apt, with exactly the pinned key, and gives its own packages only.

    Sources that someone else declared for it are commented out, with a mark.
    """
    changed = False
    keys = host.get_fact(Keyring, path=repository.keyring)
    wrong = loosened(repository.keyring, host.get_fact(FileState, path=repository.keyring))
    if keys != [repository.fingerprint]:
        wrong.append(f"{repository.keyring} holds {' '.join(keys) or 'no key'}, not {repository.fingerprint}")
    if wrong:
        # Also when others could write it and did not: it is fetched anew.
        notes.because(*wrong)
        if not repository.site:
            yield refuse(f"the repository {repository.uri} has no host in it. Correct it in hosts.toml.")
            return
        changed = True
        mistrust = repository.mistrust("FOUND")
        arguments = (repository.key_url, repository.fingerprint, repository.keyring, mistrust)
        yield script(_KEY, *arguments, timeout=600, why=aptwhy.why)
    for rival in rivals(host.get_fact(Sources), repository):
        changed = True
        where = f"{rival['path']}, line {rival['first']}"
        notes.because(f"{where} names the repository too")
        warn(f"{where} names the repository {repository.name} too: commented out, ours has the pinned key.")
        lines = (str(rival["first"]), str(rival["last"]))
        yield script(_COMMENT_OUT, rival["path"], *lines, MARK)
    # Preferences first: there is no moment in which the repository could give anything else.
    for path, text in (
        (repository.preferences_path, repository.preferences()),
        (repository.sources_path, repository.sources()),
    ):
        for command in put_if_needed(path, text):
            changed = True
            yield command
    if not changed:
        host.noop(f"the repository {repository.name} is as wanted")
        return
    yield _apt(_UPDATE_ONE, repository.sources_path)
