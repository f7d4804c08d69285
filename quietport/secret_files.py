"""What a file with a secret and its directory are: root's alone. One rule for who writes and who checks."""

from __future__ import annotations

OWNER = "root"
FILE_MODE = 0o600
FOLDER_MODE = 0o700
