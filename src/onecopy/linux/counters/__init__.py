"""The kernel's own figures: /proc, /sys and two system calls, read and parsed.

Every reader takes ``root``, the folder that holds ``proc`` and ``sys``, so that a recorded tree
serves as well as the live one; every parser is a pure function. A process that is gone raises
NotFound; what this kernel does not tell is None, never 0.

Not here: what the figures mean for a guest (``onecopy.sharing``).
"""
