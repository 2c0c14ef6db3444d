"""Who shares what: the kernel's counters, told per guest and for all of them.

``account`` turns one VMM's mappings into an account, ``report`` puts many side by side. Not here:
how the counters are read (``onecopy.linux``), and how a report is printed (``onecopy.cli``).
"""
