"""The same as `mmft-hf predict`, for `accelerate launch` and `python`."""

import sys

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
