"""Releases: the folder, the card, the operations, and the search for secrets in them."""
