"""``python -m benchmarks.gpu``; see `benchmarks.gpu`."""

import sys

from benchmarks.gpu.check import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
