"""``python -m understudy`` is the ``understudy`` command."""

import sys

from understudy.gateway.cli import main

if __name__ == "__main__":
    sys.exit(main())
