"""The module asyncio, imported without TLS.

No command speaks TLS, and OpenSSL takes a tenth of a start's imports. asyncio works without the
module ssl, as in a Python that was built without OpenSSL. Programs that use onecopy's Python API
import asyncio themselves, with TLS.
"""

from __future__ import annotations

import sys

from onecopy import later

_ABSENT = "ssl" not in sys.modules
if _ABSENT:
    # None makes an import fail (the Python language reference, "The module cache").
    sys.modules["ssl"] = None  # type: ignore[assignment]
try:
    import asyncio as asyncio
finally:
    if _ABSENT:
        later.put_off_tls()
