"""The worker: `python -m dpo_assets.training <stage> --spec spec.json`. No Dagster; torch and friends live here."""
