"""``python -m moelora``: the command line."""

import sys

from moelora.cli import main

if __name__ == "__main__":
    sys.exit(main())
