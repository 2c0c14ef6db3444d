"""`script/compare`: the same guests and applications without sharing and with each kind of it.

benchmarks/ measures parts one by one; here whole hosts of guests are held side by side. From
outside to inside: __main__.py, subprocesses.py, ways.py, mix.py; tables.py and plots.py show what
was found.
"""
