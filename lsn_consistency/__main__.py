"""
Run the command line as ``python -m lsn_consistency``.
"""

from __future__ import annotations

import sys

from lsn_consistency.cli import main

if __name__ == "__main__":
    sys.exit(main())
