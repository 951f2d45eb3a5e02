"""What surrounds the loop of `train.py`: set-up, workdir, processes, metrics, and what a run says."""
