"""The error tree: ids and exit codes. Its page is made by docgen/exit_codes.py."""

from onecopy import errors
from onecopy.errors import OnecopyError


def _classes() -> list[type[OnecopyError]]:
    return sorted(OnecopyError.__subclasses__(), key=lambda each: each.exit_code)


def test_ids_and_codes_are_unique() -> None:
    classes = _classes()
    assert len({each.id for each in classes}) == len(classes)
    assert len({each.exit_code for each in classes}) == len(classes)
    assert all(1 < each.exit_code < 125 or each.exit_code == 130 for each in classes)


def test_the_tree_in_the_docstring_lists_every_class() -> None:
    for each in _classes():
        assert f" {each.__name__} " in (errors.__doc__ or "")
