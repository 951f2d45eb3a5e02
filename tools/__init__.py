"""Programs on a finished or prepared run: `python -m tools.NAME`."""
