"""Interfaces of the Linux kernel.

``counters`` reads its counters and ``sandbox`` confines processes. The other modules wrap files,
locks, processes and memory.

Not here: what the figures mean for a guest (``onecopy.sharing``), and QEMU (``onecopy.vmm``).
"""
