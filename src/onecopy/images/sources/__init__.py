"""The sources of segments, one module each."""
