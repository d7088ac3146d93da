"""`python -m jaxsearch.compression prune --help`."""

import sys

from jaxsearch.compression.main import main

if __name__ == "__main__":
    sys.exit(main())
