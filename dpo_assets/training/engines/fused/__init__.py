"""This project's own layers for the Llama family: LoRA folded into the frozen matrices, packed attention."""
