"""The command line: ``mphub``. Nothing else imports this."""

from mphub.cli.main import main

__all__ = ["main"]
