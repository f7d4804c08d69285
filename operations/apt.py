"""Packages and signed repositories: waits for apt, repairs it, trusts no key before it is checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pyinfra.api.command import StringCommand
from pyinfra.context import host

from facts.apt import Keyring
from facts.packages import Packages
from facts.system import System
from operations import aptwait
from operations.common import Commands, operation, refuse, script, warn
from operations.files import put_if_needed
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
wait_for_apt() { python3 -I -c "$waiter" "$wait_s"; }
# Always: `dpkg --audit` does not see the journal an interrupted dpkg leaves, on which apt-get fails (ran).
repair() {
  dpkg --configure -a --force-confdef --force-confold || {
    echo "dpkg was interrupted, and 'dpkg --configure -a' does not repair it. Repair it by hand." >&2
    exit 1
  }
}
# Another apt may start between the wait and the update: lists/lock has no timeout of its own.
update() {
  for try in 1 2 3; do
    wait_for_apt
    if apt-get -q update -o Acquire::Retries=3 "$@"; then return 0; fi
    sleep 2
  done
  echo "apt-get update failed three times; what it said is above." >&2
  return 1
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
install() {
  apt-get install -y -q --no-install-recommends -o Acquire::Retries=3 -o DPkg::Lock::Timeout="$wait_s" \\
    -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -- "$@"
}
if [ -z "$fresh" ]; then
  update
  touch "$stamp"
  install "$@"
else
  # Lists of today may name a version that the mirror has replaced since.
  install "$@" || { update; install "$@"; }
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
url=$1; wanted=$2; path=$3
work=$(mktemp -d /run/quietport-key.XXXXXXXXXX)
trap 'rm -rf -- "$work"' EXIT
trap 'exit 1' HUP INT TERM PIPE
curl --fail --silent --show-error --location --proto '=https,http' --max-time 120 --max-filesize 1048576 \\
  --retry 3 --output "$work/fetched" -- "$url" || {
    echo "cannot fetch the signing key from $url" >&2
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
  echo "the key at $url has the fingerprint $(echo $found), the pinned one is $wanted: not trusted." >&2
  echo "Compare with what upstream publishes, then correct repository or fingerprint in hosts.toml." >&2
  exit 1
fi
install -d -m 0755 -- "$(dirname -- "$path")"
install -m 0644 -o root -g root -- "$work/key" "$path.quietport-new"
sync -- "$path.quietport-new"
mv -fT -- "$path.quietport-new" "$path"
"""


@dataclass(frozen=True)
class Repository:
    """A signed apt repository and the only packages that may come from it.

    `fingerprint` is the 40 hex digits of the one primary key its keyring may hold.
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
    return script(text, str(WAIT_S), *args, stdin=waiter(), timeout=INSTALL_TIMEOUT_S)


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


@operation()
def repository(repository: Repository) -> Commands:
    """A signed repository is known to apt, with exactly the pinned key, and gives its own packages only."""
    changed = False
    if host.get_fact(Keyring, path=repository.keyring) != [repository.fingerprint]:
        if not repository.site:
            yield refuse(f"the repository {repository.uri} has no host in it. Correct it in hosts.toml.")
            return
        changed = True
        yield script(_KEY, repository.key_url, repository.fingerprint, repository.keyring, timeout=600)
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
