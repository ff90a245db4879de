"""Stable Diffusion on NVIDIA Triton Inference Server: one request makes one image."""

__version__ = "0.1.0"
