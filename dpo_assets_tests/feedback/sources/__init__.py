"""Sources: what can be read, and how its bytes become rows."""
