"""The reasons why a guest's SSH host key prevents a save: its clones could not replace the key.

Not here: finding such keys in the guest (images/files/keys).
"""

from __future__ import annotations

from onecopy.errors import AgentFailed
from onecopy.vmm.guest_reply import shown

#: Prefix of the guest's answer ``failed key-REASON DETAILS``.
FAILED = "failed key-"
#: Reason -> message and hint. The details are a path, perhaps with more text.
_REASONS = {
    "certificate": (
        "the guest's SSH host key has a host certificate, which clones' new keys would not match",
        "remove the certificate and get one for each clone with --clone-hook command:CMD, or "
        "remove HostCertificate from sshd_config(5)",
    ),
    "keygen": (
        "the guest has an SSH host key but no ssh-keygen, which clones need to make new keys",
        "install ssh-keygen in the guest (Debian: openssh-client), or remove the key",
    ),
    "passphrase": (
        "an SSH host key has a passphrase, which clones cannot enter for new keys",
        "remove the passphrase (ssh-keygen -p -N '' -f KEY), or remove the key",
    ),
    "dropbear": (
        "Dropbear has an SSH host key, which it cannot replace while it runs",
        "remove the key and run `dropbear -R`, which makes a key in each clone on demand",
    ),
    "hardware": (
        "an SSH host key is on a security key, which clones do not have",
        "remove the key, and its HostKey from sshd_config(5)",
    ),
    "unreadable": (
        "the guest's ssh-keygen cannot read an SSH host key",
        "remove the key, or make a new one with ssh-keygen -A",
    ),
}


def refusal(said: str) -> AgentFailed:
    """Return the error for a guest's answer that begins with `FAILED`."""
    reason, _, details = said.removeprefix(FAILED).partition(" ")
    unknown = f"clones could not replace an SSH host key ({shown(reason)})", ""
    why, hint = _REASONS.get(reason, unknown)
    details = shown(details.strip())
    return AgentFailed(f"{why}: {details}" if details else why, hint=hint)
