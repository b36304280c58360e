"""Interventions: hook functions as values, their modes, and the packed engine."""

from transformer_lens_taskvec.interventions.intervention import Intervention, ablate, inject
from transformer_lens_taskvec.interventions.modes import InSubspace, Mode
from transformer_lens_taskvec.models.tokens import Separator

__all__ = ["InSubspace", "Intervention", "Mode", "Separator", "ablate", "inject"]
