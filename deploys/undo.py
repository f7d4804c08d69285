"""Back to a public host: `pyinfra inventory deploys/undo.py`. See docs/undo.md.

The order is the safety, the other way round: the public way is opened first, and only when a new login has
come by it is anything taken away. Firewall and sshd are one transaction of the host's guard, which undoes
what such a login does not prove.
"""

from __future__ import annotations

from pyinfra.context import host

from control import zipapp
from control.settings import settings_for
from deploys.firewall import DROP_IN
from operations import files, guard, lock, opened, publicly, sshd, timers, ufw, undo
from quietport.unit_names import FOLLOWER

settings = settings_for(host.name)

lock.held(name="undo: no other controller is at work on the host")
guard.none_left(name="undo: no change of an earlier run waits for its confirmation")
undo.programs_ready(name="undo: the programs for the way back are there", pyz=zipapp.build())
undo.firewall_opened(name="undo: the firewall lets everybody at sshd's ports")
undo.sshd_as_shipped(name="undo: sshd as the distribution ships it, in public", login_user=settings.user)
undo.firewall_as_before(name="undo: the firewall without our rules")
publicly.stays(name="undo: a new public login proves it, the guard is disarmed")
opened.forgotten(name="undo: not opened by hand any more")
undo.unit_gone(name="undo: our part of ufw.service gone", unit="ufw.service", files=[DROP_IN])
undo.unit_gone(name="undo: the follower gone", unit=FOLLOWER, files=list(sshd.FOLLOWER_FILES))
timers.no_others(name="undo: our timers gone", units=[])
files.absent(name="undo: the note about the firewall gone", path=ufw.RECORD)
undo.way_forgotten(name="operator: the public address is the way again")
