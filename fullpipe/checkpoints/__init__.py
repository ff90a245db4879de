"""Checkpoints as people have them: diffusers folders and single files, read without a network."""
