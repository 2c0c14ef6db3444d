"""onecopy: one copy of every page that guests have in common."""

__version__ = "0.1.0"
