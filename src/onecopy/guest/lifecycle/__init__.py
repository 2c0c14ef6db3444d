"""The life of a guest: boot, restore, save, stop."""
