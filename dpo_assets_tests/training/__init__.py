"""Tests of the worker: the real stories260K model, real pairs, real processes."""
