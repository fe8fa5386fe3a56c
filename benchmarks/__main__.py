"""`python -m benchmarks`: the command `selfreg-fast bench`, from a checkout."""

import sys

from selfreg_fast.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
