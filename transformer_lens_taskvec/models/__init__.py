"""Models: what the library needs of them, what they can do, and how they are run.

Differences between model classes are known here and nowhere else.
"""

from transformer_lens_taskvec.models.protocol import HookedModel

__all__ = ["HookedModel"]
