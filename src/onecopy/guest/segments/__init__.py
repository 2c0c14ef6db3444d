"""Segments of running guests: attach, detach, commit, and the guests' own requests."""
