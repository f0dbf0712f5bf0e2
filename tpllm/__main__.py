"""`python -m tpllm` is the same program as `tpllm`."""

import sys

from tpllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
