"""The command ``python -m utils.lr_scheduler``: draw the learning rate of a config."""

from utils.errors import run
from utils.lr_scheduler.plot import main

if __name__ == "__main__":
    run(main)
