"""Train one stage: `python train.py --config configs/NAME.py[:variant] --workdir DIR [--field value ...]`."""

import sys

from jaxsearch.training.main import main

if __name__ == "__main__":
    sys.exit(main())
