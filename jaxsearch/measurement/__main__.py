"""`python -m jaxsearch.measurement agreement | run --help`."""

import sys

from jaxsearch.measurement.main import main

if __name__ == "__main__":
    sys.exit(main())
