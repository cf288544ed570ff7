"""`torchrun --nproc_per_node N recipes/benchmark.py …`, or `accelerate launch …`: `mmft-hf benchmark …` by N processes, which share the cells."""

import sys

# Python looks for modules in this folder first, where evaluate.py would hide the package of that name.
sys.path.pop(0)

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
