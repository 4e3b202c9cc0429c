"""What every training run shares: folders, logs, checkpoints, processes, provenance."""
