"""Code that all parts of the project use: configuration, losses, metrics, prediction procedures, checkpoints, logs."""

import os

# Between two operations, torch's threads wait for each other in a busy loop, for milliseconds. If another program, or a
# worker of a loader, uses one of the cores, a large map takes RankDice up to 190 times as long. With this count, which
# is read when torch is imported, idle threads soon sleep: 6 times as long, and as fast as before on an idle machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
