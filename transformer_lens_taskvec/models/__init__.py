"""Models: what the library requires of them, what they can do, and running them.

Only these modules know about differences between model classes.
"""

from transformer_lens_taskvec.models.protocol import HookedModel

__all__ = ["HookedModel"]
