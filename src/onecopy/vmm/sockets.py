"""The names of QEMU's sockets in the run directory of a guest.

Not here: what is said on them (monitor.py, agent.py).
"""

#: QMP (QEMU docs/interop/qmp-spec).
MONITOR = "monitor.sock"
#: The guest's serial console.
CONSOLE = "console.sock"
