"""Whether interventions fit a model: its layers, hook points, heads and widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.layouts import position_shapes
from transformer_lens_taskvec.models.protocol import check_hook, check_layers, model_name


def check_variants(model: Any, variants: Sequence[Variant]) -> None:
    """Raise ``ValueError`` for an intervention that does not fit the model."""
    interventions: list[Intervention] = []
    for variant in variants:
        for hook in variant:
            if isinstance(hook, Intervention):
                interventions.append(hook)
            else:
                name, hook_function = hook
                check_hook(model, name)
                if isinstance(hook_function, Intervention):
                    raise ValueError(
                        f"{hook_function!r} is in a pair with the hook name {name!r}, where it "
                        "would not know the prompt from the answer; give the intervention itself, "
                        "made for that layer and hook"
                    )
    for point in dict.fromkeys(one.hook for one in interventions):
        layers = dict.fromkeys(one.layer for one in interventions if one.hook == point)
        check_layers(model, [*layers], point)
    shapes = position_shapes(model, [one.name for one in interventions])
    for one in interventions:
        check_intervention(model, one, shapes[one.name])


def check_intervention(model: Any, intervention: Intervention, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the hook point has the intervention's head and width.

    Args:
        model: The model.
        intervention: The intervention.
        shape: Of the activation at one position, from :func:`position_shapes`.
    """
    name, head, vector = intervention.name, intervention.head, intervention.vector
    if head is not None:
        cfg = model.cfg
        counts = {getattr(cfg, key, None) for key in ("n_heads", "n_key_value_heads")} - {None}
        if len(shape) != 2 or (counts and shape[0] not in counts):
            raise ValueError(
                f"head is {head}, but {name} of {model_name(model)} has no axis of heads: the "
                f"activation at one position has shape {shape}. Leave head out, or use hook='z'"
            )
        if head >= shape[0]:
            raise ValueError(
                f"head {head} is out of range: {model_name(model)} has heads 0 to "
                f"{shape[0] - 1} at {name}"
            )
    if vector is not None and vector.shape != shape[-1:]:
        raise ValueError(
            f"the vector for {name} has width {len(vector)}, and the activation of "
            f"{model_name(model)} there has {shape[-1] if shape else 'none'}. Is it from another "
            "model?"
        )
