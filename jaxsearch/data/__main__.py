"""`python -m jaxsearch.data`: see `main`."""

import sys

from jaxsearch.data.main import main

sys.exit(main())
