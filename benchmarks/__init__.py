"""Measures guests that share nothing, by KSM, by segments, and by a saved system, side by side.

Run as `script/bench`: real guests on this host, every figure from the kernel or a clock. Not here:
whether onecopy is right (tests/), what it shows to newcomers (`onecopy demo`).
"""
