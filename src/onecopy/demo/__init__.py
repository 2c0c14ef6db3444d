"""`onecopy demo`: the main job from beginning to end, on real guests, with the kernel's figures.

May import every room, as cli/ does. Not here: benchmarks/.
"""
