"""What all unit tests share: the settings of Hypothesis."""

import tests.hypothesis_settings  # noqa: F401
