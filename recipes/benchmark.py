"""`accelerate launch recipes/benchmark.py …` does what `mmft-hf benchmark …` does, in one process."""

import sys

# Python looks for modules in this folder first, where evaluate.py would hide the package of that name.
sys.path.pop(0)

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
