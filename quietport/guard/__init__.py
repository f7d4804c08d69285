"""`quietport guard`: a change that can lock the operator out undoes itself unless it is confirmed in time.

A guard is armed for one transaction. Its order is what makes a crash, a power cut or a full disk at any point
leave the old state or the new one, and never a mixture:

arm      under the lock: ballast, copy of the program, snapshot, each on the disk (fsync) before the next;
         the rollback is scheduled with systemd; armed.json appears by rename, and its directory is synced.
         Until then nothing is armed: a rollback that comes finds nothing to do, and the next arm clears what
         lies about. The token is told only when armed.json is on the disk.
exec     under the lock, which the command inherits: armed.json is read there, so no command begins once a
         rollback has, and whatever the command leaves at work still holds the lock.
confirm  under the lock: history, then armed.json goes and its directory is synced. That is the moment: before
         it a crash means rollback, after it the new state. Then the timer and the snapshot go.
rollback under the lock, taken by force after 10 s: ballast away, files, daemon-reload, firewall where the old
         state was more open, sshd and its sockets, firewall where it was more closed, tailscale, comparison,
         history, armed.json, the rest. Every step looks first and does only what is missing, so a rollback
         that was killed is begun again (by systemd, or by the next boot) and comes to the same end.
boot     before sshd, its sockets and ufw start: files and daemon-reload alone. What runs is put right by a
         rollback after they have started, scheduled before the first file is touched.

armed.json is the one truth: who removes it has won. CLOCK_BOOTTIME and the boot decide, the wall clock is
only shown.
"""
