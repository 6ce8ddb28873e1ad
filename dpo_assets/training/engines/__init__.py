"""What computes a policy's hidden states: this project's layers, Transformers', Unsloth's."""
