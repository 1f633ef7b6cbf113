"""Load weights of other programs: checkpoints of the predecessors, and the matching weights of any other file.

``names`` turns recorded names into ours, ``identify`` finds out what a checkpoint is, ``loading`` loads it. What
belongs to one model (its names, the marks of its checkpoints) is in the model's class.
"""

from models.upstream.identify import identify, infer, known_args
from models.upstream.loading import Transfer, load_weights, transfer
from models.upstream.names import strip_wrappers, translate

__all__ = ["Transfer", "identify", "infer", "known_args", "load_weights", "strip_wrappers", "transfer", "translate"]
