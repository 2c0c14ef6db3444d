"""A crash campaign: commands that change one store are killed at random times, over and over.

Start at campaign.py; `script/crash` runs it. After each kill the disk is read with json and hashlib
alone (state.py). Not here: kills at each single line of the store (tests/unit/store/test_crash.py).
"""
