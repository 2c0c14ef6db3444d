"""Hypothesis' settings, for the directories whose tests use it: importing it takes long.

No property has a deadline, and no input may come too slowly: a busy machine is no fault.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("onecopy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("onecopy")
