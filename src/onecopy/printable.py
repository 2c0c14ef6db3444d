"""Make untrusted text safe to show: names of guests, files and processes, and their output.

Terminals obey control characters: these move the cursor, change the title or inject input. Other
characters reverse the text direction or are invisible. All of them are shown as escapes.

Not here: the callers (cli/output.py, sharing/advice_page.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

#: Invisible characters that Python considers printable: fillers, joiners and variation selectors
#: (Unicode's DerivedCoreProperties.txt, Default_Ignorable_Code_Point).
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_PLAIN = re.compile("[ -~]*")
_OTHER = re.compile("[^ -~]")
#: Surrogates by which Python represents bytes that are not UTF-8 (PEP 383).
_BYTES = range(0xDC80, 0xDD00)


def escape(character: str) -> str:
    r"""Return one character as an escape: ``\x1b``, ``\u202e``, or ``\xff`` for a raw byte."""
    code = ord(character)
    if code in _BYTES:
        code -= 0xDC00
    for form, limit in (("\\x{:02x}", 0x100), ("\\u{:04x}", 0x10000)):
        if code < limit:
            return form.format(code)
    return f"\\U{code:08x}"


def printable(text: str, keep: str = "", how: Callable[[str], str] = escape) -> str:
    """Replace each control, bidirectional or invisible character of ``text``.

    Args:
        keep: characters that stay, such as the newline.
        how: makes the replacement of a character.
    """
    if _PLAIN.fullmatch(text):
        return text

    def shown(match: re.Match[str]) -> str:
        found = match[0]
        seen = found.isprintable() and not _UNSEEN.match(found)
        return found if seen or found in keep else how(found)

    return _OTHER.sub(shown, text)
