"""The kernel's interfaces: its counters (``counters``), its sandboxes, and files, locks, processes.

Not here: what the figures mean for a guest (``onecopy.sharing``), QEMU (``onecopy.vmm``).
"""
