"""The host's page cache of stored images: fill it, lock it, record what guests touch."""
