"""An attention backend of one's own that has only what each must have."""

from models.attention.eager import attend, prepare, unsupported_reason

__all__ = ["attend", "prepare", "unsupported_reason"]
