"""`onecopy demo`: builds, saves and clones real guests, and measures them by the kernel's counters.

It may import every room, as cli/ does. Not here: benchmarks (benchmarks/).
"""
