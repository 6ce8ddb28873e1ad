"""Refresh after refresh of one pipeline by its sensor, with all that feedback does, and what each leaves behind."""
