"""Studies over configurations, on Optuna. Needs the extra `sweep`."""
