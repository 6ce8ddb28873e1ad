"""Rows of a dataset, and the packed batches that are made of them."""
