"""Prompts to embeddings, the way ComfyUI does it."""

from fullpipe.text.encoder import PromptEncoder, repeat_to_same_length

__all__ = ["PromptEncoder", "repeat_to_same_length"]
