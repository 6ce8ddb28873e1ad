"""What held-out pairs prove: scores and comparisons clustered by prompt, their power, and how a release is decided.

Pure. `clusters` and `paired` compute with numpy and are for whoever scores; the rest reads what they measured.
"""
