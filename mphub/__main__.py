"""``python -m mphub`` is ``mphub``."""

import sys

from mphub.cli import main

sys.exit(main())
