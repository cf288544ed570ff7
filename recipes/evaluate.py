"""The same as `mmft-hf evaluate`, for `accelerate launch` and `python`."""

import sys

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
