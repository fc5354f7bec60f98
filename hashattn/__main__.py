"""python -m hashattn."""

import sys

from hashattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
