"""Restrictions on processes: system calls (seccomp), files (Landlock) and resources (rlimits)."""
