"""What guests share: the kernel's counters, attributed to each guest and to all of them.

``account`` turns one VMM's mappings into an account, and ``report`` puts the accounts side by side.

Not here: reading the counters (``onecopy.linux``), and printing a report (``onecopy.cli``).
"""
