"""As an agent user runs it: not root, and with a /proc that shows nobody else's processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.zipapp import build
from tests.unit.sshagent_world import PATIENCE_S, make_key

PYTHON = "/usr/bin/python3"
# An id that no account has; the kernel does not ask for one.
UID = "54321"

SCRIPT = r"""
set -u
cd /
[ "$HIDEPID" = 2 ] && mount -t proc -o hidepid=2 proc /proc
exec setpriv --reuid=$UID --regid=$UID --clear-groups sh -c '
program="$PYTHON -I $PLACE/quietport.pyz ssh-agent --runtime-root $PLACE/home/r"
OPENCLAW_SSH_PRIVATE_KEY="$(cat $PLACE/home/k)"
export OPENCLAW_SSH_PRIVATE_KEY
$program -- sh -c "
    ssh-add -l | cut -d\" \" -f3
    cat /proc/\$PPID/environ 2>/dev/null || echo hidden
    agent=\$(sed -n s/SSH_AGENT_PID=//p $PLACE/home/r/sessions/*/agent.env)
    [ -e /proc/\$agent ] && echo shown || echo not-shown
    $program --list | sed -n \"s/.* \(active\|crashed\) .*/\1/p\"
    $program --prune | cut -d\" \" -f1
    $program --stop \$CODEX_OPENCLAW_SSH_AGENT_SESSION | cut -d\" \" -f1
    $program --list | sed -n \"s/.* \(stopped\) .*/\1/p\"
    kill -TERM \$PPID
    exec sleep 60
"
echo rc=$?
$program --prune | cut -d" " -f1
$program --list | wc -l
'
"""


@pytest.fixture(name="place")
def _place() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if not Path(PYTHON).exists():
        pytest.skip("the Python of the distribution is not installed")
    # Not below pytest's own directory, which nobody else may enter.
    place = Path(f"/tmp/qp-agent-{os.getpid()}")
    place.mkdir(mode=0o755)
    try:
        (place / "home").mkdir(mode=0o700)
        (place / "quietport.pyz").write_bytes(build())
        make_key(place / "home" / "k")
        for owned in (place / "home", place / "home" / "k"):
            os.chown(owned, int(UID), int(UID))
        yield place
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("hidepid", ["0", "2"])
def test_a_session_of_a_user_who_is_not_root(place: Path, hidepid: str) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("no mount namespace can be made here")
    env = {**os.environ, "UID": UID, "PLACE": str(place), "PYTHON": PYTHON, "HIDEPID": hidepid}
    # bash keeps UID for itself.
    argv = ["unshare", "--mount", "--propagation", "private", "dash", "-c", SCRIPT]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    shown = "not-shown" if hidepid == "2" else "shown"
    assert done.stdout.split() == [
        "canary", "hidden", shown, "active", "SKIP_ACTIVE", "STOPPED", "stopped", "rc=143", "PRUNED", "1",
    ]  # fmt: skip
    assert done.stderr.count("\n") == 1
    assert "was stopped: its keys and its agent are gone" in done.stderr
