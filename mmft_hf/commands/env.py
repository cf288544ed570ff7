"""Prints versions, devices and the cache folder, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from ..version import __version__

ARGUMENTS = ()
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "huggingface_hub", "pillow")


def run() -> None:
    """Prints one `name: value` per line."""
    import torch

    from ..data.cache import cache_folder, folder_size

    versions = {"mmft_hf": __version__, "python": platform.python_version()}
    for name in (*PACKAGES, "safetensors", "tokenizers", "numpy", "torchvision"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    for name, version in versions.items():
        print(f"{name}: {version}")
    print(f"platform: {platform.platform()}")
    print(f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpu: {', '.join(devices) or 'none'}")
    print(f"cache: {cache_folder()} ({folder_size(cache_folder()) / 1e6:,.1f} MB; it may be deleted at any time)")
    print(f"offline: {os.environ.get('HF_HUB_OFFLINE', '0') == '1'}")
