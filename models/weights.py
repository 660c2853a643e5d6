"""How parameter names differ between this project and a Hugging Face checkpoint."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMap:
    """The identity, except for what a checkpoint need not or does not store."""

    not_stored: frozenset[str] = frozenset()
    """Our names that share their tensor with another parameter, so files leave them out."""

    ignorable: tuple[str, ...] = ()
    """Regular expressions of stored names that carry no parameter, such as rotary tables."""

    def to_hf(self, name: str) -> str | None:
        """Return the stored name of our parameter; None if it is not stored."""
        return None if name in self.not_stored else name

    def from_hf(self, hf_name: str) -> str | None:
        """Return our name of a stored tensor; None if it is known and carries nothing.

        A name that the model does not have comes back unchanged: the reader reports it.
        """
        if hf_name in self.not_stored:
            return None
        if any(re.fullmatch(pattern, hf_name) for pattern in self.ignorable):
            return None
        return hf_name
