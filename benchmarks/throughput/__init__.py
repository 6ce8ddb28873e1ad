"""Throughput of LoRA DPO: this project's packed trainer beside TRL's and Unsloth's, on equal weights and pairs."""
