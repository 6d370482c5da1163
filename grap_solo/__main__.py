"""``python -m grap_solo``: the same as ``grap-solo``."""

import sys

from grap_solo.cli import main

if __name__ == "__main__":
    sys.exit(main())
