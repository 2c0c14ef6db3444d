"""Reference pages and manual pages, generated from the code that they describe.

`mkdocs build` loads site.py, which adds the pages below reference/ when the site is built. None is
committed. ``python -m docgen man DIRECTORY`` writes the manual pages. Not part of the package.
"""
