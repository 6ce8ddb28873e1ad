"""A training stage that was ended goes on where it was: checkpoints, when they are written, who takes them up."""
