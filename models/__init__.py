"""Single-device model code and, beside each architecture, the plan that parallelisms read.

A tensor's name ends with its dims, in these letters everywhere in the project:

    B rows, T tokens (queries), S key and value tokens, D model width, H query heads,
    K key/value heads, C head channels, F feed-forward width, V vocabulary,
    N tokens of one chunk or of all rows joined

Letters are logical sizes and do not change when a rank holds a shard. Parameters are named as in
Hugging Face checkpoints instead.
"""

from models.plan import ModelPlan
from models.registry import load_family

__all__ = ["ModelPlan", "load_family"]
