"""What a pipeline is judged by: pure functions from measured values to verdicts. Dagster only shows them."""
