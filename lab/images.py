"""Images of blank Debian hosts, as a provider hands them over, made from nothing but Debian packages."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass

from lab.engine import Engine
from lab.process import LabError, step
from lab.state import cache_root, locked

DISTROS = ("trixie", "bookworm")
RECIPE_LABEL = "org.quietport.recipe"

# What Debian's own cloud images have and a converge leans on. No ufw, docker, tailscale or curl: the
# converge has to bring what it needs.
PACKAGES = (
    "ca-certificates",
    "cron",
    "dbus",
    "init",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libpam-systemd",
    "netbase",
    "openssh-server",
    "openssh-sftp-server",
    "procps",
    "python3",
    "sudo",
    "systemd-sysv",
)

# Run by mmdebstrap, $1 is the image's root.
HOOKS = (
    # Every target makes or is given its own; the same ones everywhere would make pinning meaningless.
    'rm -f "$1"/etc/ssh/ssh_host_*',
    'chroot "$1" passwd --quiet --lock root',
    # mmdebstrap copies these from the machine it runs on; a target writes its own when it starts.
    ': > "$1"/etc/hostname; rm -f "$1"/etc/resolv.conf; : > "$1"/etc/resolv.conf',
    # An empty one makes systemd write a new one at the first boot (machine-id(5)).
    ': > "$1"/etc/machine-id; rm -f "$1"/var/lib/dbus/machine-id',
    # A container has neither the right nor the need: time and kernel modules are this machine's.
    'chroot "$1" systemctl mask --quiet systemd-modules-load.service systemd-timesyncd.service'
    " sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount modprobe@.service",
    'install -d -m 0700 "$1"/root/.ssh',
)


@dataclass(frozen=True)
class Recipe:
    """All that decides what is in an image."""

    distro: str
    packages: tuple[str, ...] = PACKAGES
    hooks: tuple[str, ...] = HOOKS

    @property
    def digest(self) -> str:
        """Changes when anything in the recipe does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def tag(self) -> str:
        """The image's name in Docker."""
        return f"quietport-lab/{self.distro}:{self.digest[:12]}"

    def build_argv(self) -> list[str]:
        """mmdebstrap to stdout as a tar. No mirror is named: it takes the distribution's default, with
        the updates and security suites."""
        hooks = [f"--customize-hook={hook}" for hook in self.hooks]
        included = f"--include={','.join(self.packages)}"
        return ["mmdebstrap", "--quiet", "--variant=minbase", included, *hooks, self.distro, "-"]


def ensure(engine: Engine, distro: str) -> str:
    """The image of a blank host, built when the daemon has none by this recipe. Returns its name.

    Raises LabError when the distribution is unknown or the build fails.
    """
    if distro not in DISTROS:
        raise LabError(f"No image for {distro!r}.", hint=f"It is one of: {', '.join(DISTROS)}.")
    recipe = Recipe(distro)
    cache = cache_root()
    with locked(cache / "images.lock"):
        if engine.docker("image", "inspect", recipe.tag, check=False).returncode != 0:
            with step(f"image of a blank Debian host, {distro}"):
                _build(engine, recipe)
    return recipe.tag


def _build(engine: Engine, recipe: Recipe) -> None:
    log = cache_root() / f"image-{recipe.distro}.log"
    label = f"LABEL {RECIPE_LABEL}={recipe.digest}"
    load = engine.argv("import", "--change", label, "-", recipe.tag)
    with log.open("w") as sink:
        try:
            build = subprocess.Popen(recipe.build_argv(), stdout=subprocess.PIPE, stderr=sink)
        except FileNotFoundError as error:
            raise LabError("mmdebstrap: not installed.", hint="`make lab-up` installs it.") from error
        loaded = subprocess.run(load, stdin=build.stdout, stdout=sink, stderr=sink, check=False)
        if build.stdout:
            build.stdout.close()
        if build.wait() != 0:
            # Half a tar imports without an error: what came of it must not pass for the image.
            engine.docker("image", "rm", "--force", recipe.tag, check=False)
    if build.returncode != 0 or loaded.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
        raise LabError(f"The image of {recipe.distro} was not made: {tail}", hint=f"All of its output: {log}")
