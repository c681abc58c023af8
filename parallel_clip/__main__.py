"""`python -m parallel_clip` is `parallel-clip`."""

import sys

from parallel_clip.cli import main

if __name__ == "__main__":
    sys.exit(main())
