"""Mixers that carry a state along the row: delta nets, short convolutions, Mamba. States never cross rows."""
