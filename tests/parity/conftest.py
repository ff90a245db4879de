"""A real ComfyUI, and one thread of torch, for every parity test."""

import subprocess

import pytest
import torch
from comfyui import install


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI's tree in the user's cache, downloaded at the first use."""
    try:
        return install()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"ComfyUI could not be downloaded: {error.stderr}")


@pytest.fixture(autouse=True)
def single_thread():
    """Two processes compute at once; more threads would only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
