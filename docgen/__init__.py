"""Generates reference pages and manual pages from the code that they describe.

`mkdocs build` loads site.py, which adds the pages below reference/ to the site. They are not
committed. ``python -m docgen man DIRECTORY`` writes the manual pages. The package does not contain
docgen.
"""
