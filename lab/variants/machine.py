"""Variants of the machine: what apt, Docker, ufw, tailscale and an older quietport leave on a host."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

from lab import hosts, keys, testimage
from lab.process import LabError, run
from lab.state import Run, Target, cache_root, locked, write
from lab.variants.model import Around, Variant, fixed

# What a variant writes down on its target, for the tests to compare with.
NOTES = "/var/lib/lab-variant"
HELD_S = 90

# Holds the locks as apt does (fcntl, whole file) until HELD_S after somebody else opens one of them, which
# only who wants to lock does: a converge that waits, or another apt. Its name is what it is in life.
_HOLDER = f"""
import ctypes, fcntl, json, os, time
paths = ["/var/lib/dpkg/lock-frontend", "/var/lib/dpkg/lock", "/var/lib/apt/lists/lock",
         "/var/cache/apt/archives/lock"]
for path in paths:
    fcntl.lockf(os.open(path, os.O_RDWR | os.O_CREAT, 0o640), fcntl.LOCK_EX | fcntl.LOCK_NB)
with open("/proc/self/comm", "w") as file:
    file.write("unattended-upgr")
libc = ctypes.CDLL(None)
watch = libc.inotify_init()
for path in paths:
    assert libc.inotify_add_watch(watch, path.encode(), 0x20) > 0  # IN_OPEN, inotify(7)
open("/run/lab-locks-held", "w").close()
os.read(watch, 4096)
began = time.time()
time.sleep({HELD_S})
with open("{NOTES}/locks", "w") as file:
    json.dump({{"wanted": began, "free": time.time()}}, file)
"""
_APT_LOCKED = f"""
mkdir -p {NOTES}
cat >/usr/local/lib/lab-locks.py <<'END'{_HOLDER}END
systemd-run --quiet --unit=lab-locks python3 -I /usr/local/lib/lab-locks.py
for try in $(seq 100); do
  [ ! -e /run/lab-locks-held ] || exit 0
  sleep 0.1
done
systemctl status lab-locks >&2
exit 1
"""

# dpkg is killed by a package it configures, as by a power cut. Another one it had unpacked lacks what it
# depends on, as when apt-get is cut off half-way: that one dpkg alone cannot finish.
_DPKG_INTERRUPTED = r"""
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get -q update >/dev/null
apt-get -q download jq
dpkg --unpack ./jq_*.deb
mkdir -p box/DEBIAN
cat >box/DEBIAN/control <<'END'
Package: lab-interrupted
Version: 1
Architecture: all
Maintainer: quietport lab <lab@quietport.invalid>
Description: kills the dpkg that configures it, the first time
END
cat >box/DEBIAN/postinst <<'END'
#!/bin/sh
[ ! -e /var/lib/lab-interrupted ] || exit 0
touch /var/lib/lab-interrupted
kill -KILL "$PPID"
sleep 1
END
chmod 0755 box/DEBIAN/postinst
dpkg-deb --build box lab-interrupted.deb >/dev/null
if dpkg --install ./lab-interrupted.deb; then
  echo "dpkg was not interrupted" >&2
  exit 1
fi
# It is what it is meant to be: apt-get refuses to do anything, and dpkg alone does not mend it.
if said=$(apt-get -q -y install base-files 2>&1); then
  echo "apt-get does not mind the interruption: $said" >&2
  exit 1
fi
case "$said" in *'dpkg was interrupted'*) ;; *) echo "apt-get fails otherwise: $said" >&2; exit 1 ;; esac
dpkg-query -W -f '${db:Status-Status}\n' jq | grep -qx unpacked
"""

WEB, DATABASE = 8080, 5432
PROJECT = "shop"
_IMAGE = "lab-busybox"
# Each start of a container leaves a line in it: whether it was restarted, and when, can be read later.
# (With an init: without, its first process ignores SIGTERM, and the host's shutdown waits 90 s for it.)
_SERVE = "/bin/busybox date +%s >>/starts; exec /bin/busybox httpd -f -p {} -h /"


def _docker_script(_run: Run, target: Target, _around: Around) -> str:
    """Docker as Debian has it, a container, a compose project, and a firewall somebody thought would help."""
    packages = ["docker.io", "docker-compose", "ufw", "busybox-static"]
    # Debian 13 split the command line off.
    packages += ["docker-cli"] if target.distro == "trixie" else []
    install = f"apt-get -q -y install --no-install-recommends {' '.join(packages)}"
    serve = [f"/bin/busybox sh -c '{_SERVE.format(port)}'" for port in (80, DATABASE)]
    return f"""
export DEBIAN_FRONTEND=noninteractive
apt-get -q update >/dev/null
{install}
set -- {_IMAGE}
{testimage.IN_A_TARGET}
docker run -d --name web --init --restart always -p 0.0.0.0:{WEB}:80 {_IMAGE} {serve[0]}
mkdir -p /srv/{PROJECT}
cat >/srv/{PROJECT}/docker-compose.yml <<'END'
version: "2.4"
services:
  db:
    image: {_IMAGE}
    command: {serve[1]}
    init: true
    restart: always
    ports: ["{DATABASE}:{DATABASE}"]
END
cd /srv/{PROJECT}
docker-compose up -d
docker network inspect {PROJECT}_default >/dev/null
mkdir -p {NOTES}
docker ps -q --no-trunc | sort >{NOTES}/containers
test "$(wc -l <{NOTES}/containers)" = 2
ufw allow 22/tcp
ufw allow {DATABASE}/tcp
ufw --force enable
"""  # noqa: S608, this is shell


def _tailnet_script(_run: Run, target: Target, around: Around) -> str:
    """tailscale by its upstream's own instructions, and Tailscale SSH on."""
    uri = around.repository.tailscale_uri
    keyring = "/usr/share/keyrings/tailscale-archive-keyring.gpg"
    key = around.tailnet.auth_key().read_text().strip()
    return f"""
export DEBIAN_FRONTEND=noninteractive
apt-get -q update >/dev/null
apt-get -q -y install --no-install-recommends curl
curl -fsS {uri}/{target.distro}.noarmor.gpg >{keyring}
echo 'deb [signed-by={keyring}] {uri} {target.distro} main' >/etc/apt/sources.list.d/tailscale.list
apt-get -q update >/dev/null
apt-get -q -y install tailscale
(umask 077; echo {key} >/run/lab-key)
tailscale up --login-server={around.tailnet.login_server} --auth-key=file:/run/lab-key \
  --hostname={target.name} --ssh --timeout=60s
rm /run/lab-key
tailscale debug prefs | grep -q '"RunSSH": true'
mkdir -p {NOTES}
tailscale ip | sort >{NOTES}/addresses
test -s {NOTES}/addresses
"""


# The last state of the project before it knew hosts that are not blank.
OLDER = "6765b59"
CONVERGE_TIMEOUT_S = 1500
_PROJECT = Path(__file__).resolve().parents[2]


def _older_source() -> Path:
    """A copy of the project as it was at OLDER. Raises LabError where its history does not go back so far."""
    copy = cache_root() / f"older-{OLDER}"
    with locked(copy.with_suffix(".lock")):
        if (copy / "complete").is_file():
            return copy
        git = ["git", "-C", str(_PROJECT)]
        if run([*git, "cat-file", "-e", f"{OLDER}^{{commit}}"], check=False).returncode != 0:
            raise LabError(
                f"This checkout has no commit {OLDER}, whose converge the variant runs.",
                hint="Fetch it: git fetch --unshallow, or clone the project with its history.",
            )
        copy.mkdir(parents=True, exist_ok=True)
        packed = copy.with_suffix(".tar")
        run([*git, "archive", f"--output={packed}", OLDER])
        with tarfile.open(fileobj=io.BytesIO(packed.read_bytes())) as tar:
            tar.extractall(copy, filter="data")
        packed.unlink()
        (copy / "complete").touch()
    return copy


def _older_converge(run_: Run, target: Target, around: Around) -> None:
    """Converge the target with the older project, as its operator did then: same state, same hosts file."""
    source = _older_source()
    file = run_.directory / f"older-{target.name}.toml"
    # Beside lab.json: what this remembers of the host is what the operator's side knows later.
    text = hosts.hosts_toml(
        [target],
        services=hosts.Services.of(around.tailnet, around.repository),
        identity_file=keys.operator_key(run_),
        auth_keys={target.name: around.tailnet.auth_key()},
        example_secret=hosts.example_secret(run_),
        more={target.name: {"docker_source": "none"}},
    )
    write(file, text)
    environment = {"PYTHONPATH": str(source), "QUIETPORT_HOSTS": str(file), "PYINFRA_PROGRESS": "off"}
    argv = [sys.executable, "-m", "pyinfra", "inventory", "deploys/vps.py", "-y"]
    run(argv, cwd=source, env=environment, timeout=CONVERGE_TIMEOUT_S)


# What time and a still older version do: a file of ours that reads differently and that sshd has not read, a
# rule and a timer that are no longer wanted, unit files with other texts, and no reload after them.
_OLDER = rf"""
mkdir -p {NOTES}
sha256sum </usr/local/lib/quietport/quietport.pyz >{NOTES}/programs
ufw allow in on tailscale0 to any port 22 proto tcp comment 'quietport: ssh over the tailnet'
cd /etc/systemd/system
for kind in service timer; do sed 's/ report$/ retired/' quietport-report.$kind >quietport-retired.$kind; done
systemctl enable --now --quiet quietport-retired.timer
sed -i 's/^OnCalendar=.*/OnCalendar=weekly/' quietport-report.timer
sed -i '1a # ClientAliveInterval was not set here' /etc/ssh/sshd_config.d/00-quietport.conf
"""

VARIANTS = (
    Variant(
        name="apt-locked",
        what=f"another process holds apt's locks until {HELD_S} s after the converge asks for them",
        script=fixed(_APT_LOCKED),
    ),
    Variant(
        name="dpkg-interrupted",
        what="dpkg was killed in the middle of its work, and left a package without what it depends on",
        script=fixed(_DPKG_INTERRUPTED),
    ),
    Variant(
        name="docker-published",
        what="Docker publishes a container and a compose project's database to everyone, and ufw is on",
        script=_docker_script,
    ),
    Variant(
        name="tailnet-ssh",
        what="the host joined the tailnet by hand, with Tailscale SSH; there is no key to join with",
        script=_tailnet_script,
        keys=lambda _run, _target: {"auth_key": None},
        conflicts=frozenset({"older-converge"}),
    ),
    Variant(
        name="older-converge",
        what="an older quietport has converged the host, and left what is no longer wanted",
        script=fixed(_OLDER),
        here=_older_converge,
        # It logged in as root, to a host nobody had touched.
        conflicts=frozenset({"sudo-password", "ssh-socket", "foreign-listen", "no-include"}),
    ),
)
