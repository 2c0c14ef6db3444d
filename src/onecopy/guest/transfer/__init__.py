"""Files and directories into a guest, and out of it."""
