"""The command ``python -m utils.predict``: apply a prediction procedure to saved probabilities."""

from utils.errors import run
from utils.predict.decode import main

if __name__ == "__main__":
    run(main)
