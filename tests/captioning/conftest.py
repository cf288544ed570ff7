"""The tiny image-text-to-text model, a real server of it, and the embedded captions with a model that knows them."""

import os
import subprocess
import sys
import time
import urllib.request

import pytest
from launch_tools import free_port
from tiny_vlm import build_tiny_vlm

from mmft_hf.captioning.refine import CaptionTable
from mmft_hf.data.splits import load_captioned_dataset


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    return build_tiny_vlm(tmp_path_factory.mktemp("models") / "tiny-vlm")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a server, which loads a model when it is first asked for it."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def emoji():
    """The training images and captions of the embedded data, whose pairs the model has seen, and the model."""
    from mmft_hf.captioning.steps.scorer import Scorer

    data = load_captioned_dataset(captions_column="text")["train"]
    table = CaptionTable("emoji", data, "concept")
    return table.rows, Scorer("builtin/tiny-clip", table.images())
