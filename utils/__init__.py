"""What every room may use: configuration, losses, metrics, prediction procedures, checkpoints, logs."""
