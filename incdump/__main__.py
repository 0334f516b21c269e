"""``python -m incdump`` is the command ``incdump``."""

from __future__ import annotations

import sys

from incdump.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
