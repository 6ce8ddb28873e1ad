"""The parts of the in-test Hugging Face Hub: what it stores and the routes it serves."""
