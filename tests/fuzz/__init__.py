"""A fuzz of every reader of foreign bytes: guests', images', other processes', the store's own.

Start at readers.py, which says what is read; `script/fuzz` runs it (campaign.py). The rule: nothing
but the reader's documented errors, nothing left on disk, nothing over its deadline or memory. Not
here: replies of real guests (tests/hostile).
"""
