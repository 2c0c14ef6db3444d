"""The kernel's counters of memory: /proc and /sys, read and parsed."""
