"""`python -m dpo_assets.demo.home`: makes DAGSTER_HOME ready for the UI, before any run."""

from __future__ import annotations

from dpo_assets.demo.run import prepare_home

if __name__ == "__main__":
    prepare_home()
