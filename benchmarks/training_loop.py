"""Training loops: the same as `python -m bnfast bench --loop`."""

import sys

from bnfast.commands.bench import main

if __name__ == "__main__":
    sys.exit(main(["--loop", *sys.argv[1:]]))
