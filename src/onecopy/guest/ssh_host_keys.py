"""SSH host keys that clones could not make new: why a guest that has one is not saved.

Not here: how the guest finds that out (images/files/keys).
"""

from __future__ import annotations

from onecopy.errors import AgentFailed
from onecopy.vmm.guest_reply import shown

#: How the guest says it: ``failed key-REASON DETAILS``.
FAILED = "failed key-"
#: Reason -> what is the matter, and a way out. The details are a path, and more.
_REASONS = {
    "certificate": (
        "a host certificate certifies the SSH host key of this guest, and clones get other keys",
        "remove the certificate, and let --clone-hook command:CMD get one for each clone; or take "
        "HostCertificate out of sshd_config(5)",
    ),
    "keygen": (
        "there is an SSH host key, but no ssh-keygen to make others with",
        "install it in the guest (Debian: openssh-client), or remove the key",
    ),
    "passphrase": (
        "an SSH host key has a passphrase, which nobody could give for the keys of clones",
        "take it out of the key (ssh-keygen -p -N '' -f KEY), or remove the key",
    ),
    "dropbear": (
        "Dropbear has an SSH host key, and takes no other while it runs",
        "remove it and run `dropbear -R`, with which each clone makes its own when it is needed",
    ),
    "hardware": (
        "an SSH host key is in a security key, of which clones have none",
        "remove it, and its HostKey from sshd_config(5)",
    ),
    "unreadable": (
        "the guest's ssh-keygen cannot read an SSH host key",
        "make it anew (ssh-keygen -A), or remove it",
    ),
}


def refusal(said: str) -> AgentFailed:
    """The error for what a guest said that begins with `FAILED`."""
    reason, _, details = said.removeprefix(FAILED).partition(" ")
    unknown = f"an SSH host key cannot be made anew ({shown(reason)})", ""
    why, hint = _REASONS.get(reason, unknown)
    details = shown(details.strip())
    return AgentFailed(f"{why}: {details}" if details else why, hint=hint)
