"""JSON Schemas of the commands' output, from the types that they encode.

Not here: the meaning of fields (docs/json.md).
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from onecopy.guest.lifecycle.disks import OwnDisk
from onecopy.guest.lifecycle.pool import Pool
from onecopy.guest.machine import SystemConfig
from onecopy.guest.observe.advise import Step
from onecopy.guest.observe.doctor import Finding
from onecopy.guest.pagecache.pin import Pinned
from onecopy.guest.pagecache.preload import Warmed
from onecopy.guest.run_directory import GuestRecord
from onecopy.images.kernel import KernelConfig
from onecopy.images.range_record import SegmentConfig
from onecopy.sharing.account import GuestAccount
from onecopy.sharing.advice import FileFound, Looked, Way
from onecopy.sharing.cross_check import Check
from onecopy.sharing.forecast import Forecast, Profile
from onecopy.sharing.ksm_settings import Status
from onecopy.sharing.report import Blob
from onecopy.sharing.survey import LeftOut

PLACE = "reference/schemas"
#: File -> its objects, the commands that print them, and their type.
SCHEMAS: dict[str, tuple[str, type[Any]]] = {
    "guest": ("each guest of `ps`, `run` and `boot`", GuestRecord),
    "disk": ("each disk of `disks`", OwnDisk),
    "pool": ("each pool of `pool`", Pool),
    "segment-config": ("`config` of a segment in `inspect`", SegmentConfig),
    "system-config": ("`config` of a saved system in `inspect`", SystemConfig),
    "kernel-config": ("`config` of a kernel in `inspect`", KernelConfig),
    "preloaded": ("each blob of `preload`", Warmed),
    "pinned": ("each entry of `preload --pin`", Pinned),
    "ksm-status": ("`ksm status`, without `gain`", Status),
    "account": ("each guest of `report`", GuestAccount),
    "blob": ("each blob of `report`", Blob),
    "check": ("`check` of `report --check`", Check),
    "advised-guest": ("each guest of `advise`", Looked),
    "advised-way": ("each way of `advise`", Way),
    "advised-file": ("each file of `advise`", FileFound),
    "advised-left-out": ("each entry of `left_out` of `advise`", LeftOut),
    "advised-step": ("each step of `advise`", Step),
    "forecast": ("`plan`, without `profile`", Forecast),
    "profile": ("`profile` of `plan`", Profile),
    "finding": ("each finding of `doctor`", Finding),
}
_HEAD = """# JSON schemas

Each file is a JSON Schema (2020-12) of one object that commands print. [JSON](../json.md) says what
the fields mean. Fields may be added, so validators must allow fields that they do not know.

| Schema | Describes | Fields |
|---|---|---:|
"""


def files() -> dict[str, str]:
    """Return path -> content of the page and of each schema."""
    found = {f"{PLACE}/{name}.json": schema(name) for name in SCHEMAS}
    rows = [
        f"| [{name}.json](schemas/{name}.json) | {where} | {len(kind.__struct_fields__)} |"
        for name, (where, kind) in SCHEMAS.items()
    ]
    return {"reference/json-schemas.md": _HEAD + "\n".join(rows) + "\n", **found}


def schema(name: str) -> str:
    """Return one schema as JSON text."""
    where, kind = SCHEMAS[name]
    found = msgspec.json.schema(kind, schema_hook=_other)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "description": where.replace("`", ""),
    }
    return json.dumps(head | found, indent=2) + "\n"


def _other(kind: type) -> dict[str, Any]:
    """Describe a type that msgspec leaves to the encoder, which prints it as text."""
    return {"type": "string", "title": kind.__name__}
