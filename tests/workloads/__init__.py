"""Real workloads in booted guests, in clones, and in a chroot of the same root: same results."""
