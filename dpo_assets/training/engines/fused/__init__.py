"""This project's own layers for every decoder that a description has words for: LoRA folded into the frozen matrices,
packed attention, backward passes of their own."""
