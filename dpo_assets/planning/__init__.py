"""What a run will do, decided before it starts: precision with its reason, memory, token budget, steps."""
