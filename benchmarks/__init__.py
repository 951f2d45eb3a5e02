"""What measures speed, memory and scaling, beside its reference: `python -m benchmarks.NAME` ends in one JSON line."""
