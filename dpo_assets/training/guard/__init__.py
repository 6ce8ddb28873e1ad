"""What watches a run: values that are not finite, collapse, and what an adapter did."""
