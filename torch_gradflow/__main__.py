"""``python -m torch_gradflow``: see ``torch_gradflow.command_line``."""

import sys

from torch_gradflow.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
