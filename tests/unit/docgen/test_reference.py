"""Generated pages of the reference: exit codes, the Python API, JSON schemas."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec

import onecopy
from docgen import exit_codes, json_schemas, python_api
from onecopy.aio.options import BootOptions, GuestBootOptions, StartOptions
from onecopy.errors import OnecopyError
from tests.unit.guest_kit import record


def test_the_page_of_exit_codes_has_every_class() -> None:
    page = exit_codes.page()
    for each in OnecopyError.__subclasses__():
        assert f"| {each.exit_code} | `{each.id}` |" in page
    assert "\n| 0 |" in page and "\n| 1 | `error` |" in page


def test_the_python_page_has_every_public_name() -> None:
    page = python_api.page()
    for kind in (onecopy.Host, onecopy.Guest):
        for name in vars(kind):
            if not name.startswith("_"):
                assert re.search(rf"^### {kind.__name__}\.{name}(\(\))?$", page, re.M), name
    for each in OnecopyError.__subclasses__():
        assert f"| `{each.__name__}` |" in page


def test_signatures_are_as_they_are_called() -> None:
    page = python_api.page()
    assert "Host.guest(name: str) -> Guest\n" in page
    assert "    *,\n    clone_hooks: Sequence[str] | None = None,\n" in page
    assert "    system: str,\n    count: int = 1,\n    **options: Unpack[StartOptions],\n" in page
    assert ") -> ContextManager[list[Guest]]\n" in page


def test_options_have_those_of_their_bases() -> None:
    """Each field of the class has a row, and a row has what stands under the field."""
    page = python_api.page()
    for kind in (StartOptions, GuestBootOptions, BootOptions):
        table = page.partition(f"\n## {kind.__name__}\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == kind.__annotations__.keys()
        assert "| `accel` | `str` | The accelerator: `auto` (the default), `kvm` or" in table


def test_docstrings_become_markdown() -> None:
    text = (
        "Do it with ``a_b`` or `Host`.\n\nArgs:\n    one: First,\n        and more.\n    two: It."
    )
    assert python_api.document(text).splitlines() == [
        "Do it with `a_b` or `Host`.",
        "",
        "",
        "**Args:**",
        "",
        "- `one`: First,",
        "  and more.",
        "- `two`: It.",
    ]


def test_schemas_describe_what_is_printed() -> None:
    """Each property of the schema is printed, each printed field is a property of that type."""
    schema = json.loads(json_schemas.schema("guest"))
    printed = json.loads(msgspec.json.encode(record("web")))
    shape = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    assert shape["properties"].keys() == printed.keys()
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "array": list}
    checked = 0
    for name, value in shape["properties"].items():
        if value.get("type") in kinds:
            assert isinstance(printed[name], kinds[value["type"]]), name
            checked += 1
    assert checked >= 10


def test_every_schema_has_a_file() -> None:
    files = json_schemas.files()
    for name in json_schemas.SCHEMAS:
        assert json.loads(files[f"reference/schemas/{name}.json"])["title"] == name
        assert f"schemas/{name}.json" in files["reference/json-schemas.md"]


def test_schemas_are_of_documented_objects() -> None:
    """docs/json.md has all fields of each schema's object."""
    text = (Path(__file__).parents[3] / "docs/json.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    for name, (_, kind) in json_schemas.SCHEMAS.items():
        fields = set(
            msgspec.json.schema(kind, schema_hook=lambda _: {})["$defs"][kind.__name__].get(
                "properties", ()
            )
        )
        assert fields and fields <= documented, name
