"""Compares guests that share nothing, by KSM, by segments, and by a saved system.

Run as `script/bench`. It measures real guests on this host, by the kernel's counters and clocks.
Not here: tests (tests/), the demonstration for new users (`onecopy demo`).
"""
