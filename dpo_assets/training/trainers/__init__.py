"""What makes batches, losses and steps."""
