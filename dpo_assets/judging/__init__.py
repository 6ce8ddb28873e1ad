"""Answers compared by a language model: asked in both orders, remembered, and corrected by what people preferred."""
