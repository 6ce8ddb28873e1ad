"""Unsloth: prepared and loaded (`loading`), and its forward as an engine (`engine`)."""
