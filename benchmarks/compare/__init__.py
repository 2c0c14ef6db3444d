"""`script/compare`: runs the same guests without sharing, and with each kind of sharing.

benchmarks/ measures single parts. This package compares whole hosts of guests. From outside to
inside: __main__.py, run.py, ways.py, mix.py. tables.py and plots.py show the results.
"""
