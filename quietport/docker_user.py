"""The chains that keep the public side away from containers."""

from __future__ import annotations

import json

from quietport.errors import HostProgramError


def backend_of(daemon_json: str, command_line: str = "") -> str:
    """The firewall dockerd uses: iptables, nftables or none (`"iptables": false`).

    `daemon_json` is the text of daemon.json ("" when absent), `command_line` any text with dockerd's flags.
    Raises HostProgramError when daemon.json is not a JSON object.
    """
    try:
        config = json.loads(daemon_json or "{}")
    except ValueError as error:
        raise HostProgramError("daemon.json is not JSON: dockerd itself would not start with it.") from error
    if not isinstance(config, dict):
        raise HostProgramError("daemon.json is not a JSON object.")
    flags = command_line.replace("--firewall-backend ", "--firewall-backend=")
    if config.get("firewall-backend") == "nftables" or "--firewall-backend=nftables" in flags:
        return "nftables"
    if config.get("iptables") is False or "--iptables=false" in flags:
        return "none"
    return "iptables"
