"""Text of others, so that it can be shown: names of guests, files, processes; what they print.

A terminal obeys control characters: they move the cursor, change the title, answer as if typed.
Some others turn text around, or cannot be seen. All of these are shown as escapes. Not here: where
that is done (cli/output.py, sharing/advice_page.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

#: Nothing to see, though Python takes them for printable: fillers, joiners and variants (Unicode's
#: DerivedCoreProperties.txt, Default_Ignorable_Code_Point).
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_PLAIN = re.compile("[ -~]*")
_OTHER = re.compile("[^ -~]")
#: How Python keeps bytes that are no UTF-8 (PEP 383).
_BYTES = range(0xDC80, 0xDD00)


def escape(character: str) -> str:
    r"""One character as text: ``\x1b``, ``\u202e``; a byte that is no UTF-8: ``\xff``."""
    code = ord(character)
    if code in _BYTES:
        code -= 0xDC00
    for form, limit in (("\\x{:02x}", 0x100), ("\\u{:04x}", 0x10000)):
        if code < limit:
            return form.format(code)
    return f"\\U{code:08x}"


def printable(text: str, keep: str = "", how: Callable[[str], str] = escape) -> str:
    """``text`` with ``how`` of each character that acts, or that nobody can see.

    Those in ``keep`` stay, such as the newline.
    """
    if _PLAIN.fullmatch(text):
        return text

    def shown(match: re.Match[str]) -> str:
        found = match[0]
        seen = found.isprintable() and not _UNSEEN.match(found)
        return found if seen or found in keep else how(found)

    return _OTHER.sub(shown, text)
