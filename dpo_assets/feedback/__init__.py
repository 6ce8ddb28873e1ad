"""Feedback in, canonical preference pairs out; every row that is not accepted is kept with its reason."""
