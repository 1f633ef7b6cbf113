"""Code that all parts of the project use: configuration, losses, metrics, prediction procedures, checkpoints, logs."""
