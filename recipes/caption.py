"""The same as `mmft-hf caption`, for `accelerate launch` and `python`."""

import sys

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["caption", *sys.argv[1:]]))
