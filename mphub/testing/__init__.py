"""The kit for testing programs that use mphub: with pytest as the fixtures ``hub``, ``clock`` and ``process_hub``, without it as well."""

from mphub.testing.clock import Clock
from mphub.testing.faults import Kills, kill, kill_on
from mphub.testing.recorder import Recorder
from mphub.testing.running import running

__all__ = ["Clock", "Kills", "Recorder", "kill", "kill_on", "running"]

pytest_plugins = ("pytest_mphub",)
"""For pytest runs that load no plugins by themselves: ``-p mphub.testing``."""
