"""The kernel's counters in /proc and /sys and from two system calls.

Every reader takes ``root``, the directory that contains ``proc`` and ``sys``, so that it can also
read recorded trees. Every parser is a pure function. Readers raise NotFound for a process that has
ended. A figure that this kernel does not report is None, never 0.

Not here: what the figures mean for a guest (``onecopy.sharing``).
"""
