"""Serve a trained funnel: `python serve.py build | batch | label | summarise --help`."""

import sys

from jaxsearch.serving.main import main

if __name__ == "__main__":
    sys.exit(main())
