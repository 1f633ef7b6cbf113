"""One script per question, one table each: ``python -m benchmarks.NAME``."""
