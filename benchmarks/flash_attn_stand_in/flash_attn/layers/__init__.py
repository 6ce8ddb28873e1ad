"""Layers of flash-attn that are imported."""
