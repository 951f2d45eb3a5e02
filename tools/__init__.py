"""Programs beside training, on configs, data sets and runs: `python -m tools.NAME`."""
