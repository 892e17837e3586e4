"""`python -m kvdsl` and the command `kvdsl`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    from kvdsl.codegen.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
