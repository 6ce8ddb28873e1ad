"""The stages of the worker: each one file, read top to bottom."""
