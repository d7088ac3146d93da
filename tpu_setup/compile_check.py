"""Does it fit? `python tpu_setup/compile_check.py --topology v5e:4x4 --config configs/ranker.py:qwen3_0_6b [--json] [--scoring]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxsearch.aot.main import main

if __name__ == "__main__":
    sys.exit(main())
