"""`python -m densecl_ext` is `densecl`."""

from __future__ import annotations

import sys

from densecl_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
