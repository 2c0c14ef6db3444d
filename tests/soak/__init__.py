"""The soak: thousands of clones start, stop and are killed, and nothing is left."""
