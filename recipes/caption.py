"""`accelerate launch recipes/caption.py …` does the same as `mmft-hf caption …`. Several processes share the pictures of
--captioner transformers; servers are asked by the first process alone.
"""

import sys

# Python looks for modules in this folder first, where evaluate.py would hide the package of that name.
sys.path.pop(0)

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["caption", *sys.argv[1:]]))
