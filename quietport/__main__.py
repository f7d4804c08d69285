"""`python3 -m quietport NAME`: the same programs from a checkout."""

import sys

from quietport.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
