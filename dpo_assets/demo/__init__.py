"""The demo: the pipelines of `defs/`, run and watched from a terminal."""
