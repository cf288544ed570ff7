"""`accelerate launch recipes/finetune.py --config recipes/quickstart/finetune.yaml`: the same as `mmft-hf finetune`."""

import sys

from mmft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
