"""The lab: small transformers trained here, in which task vectors can be watched as they emerge."""

from transformer_lens_taskvec.lab.episodes import RegressionEpisode, regression_episodes
from transformer_lens_taskvec.lab.mixtures import (
    Batch,
    Family,
    LeakyReLU,
    LinearOnRepresentation,
    Mixture,
    RegressionFamilies,
    SparseLinear,
    SparseLinearMixture,
    balanced_labels,
    linear,
    quadratic,
)
from transformer_lens_taskvec.lab.model import RegressionConfig, RegressionTransformer, interleave
from transformer_lens_taskvec.lab.oracles import (
    MixturePosterior,
    OracleErrors,
    bayes_mixture,
    lasso,
    least_squares,
    oracle_errors,
    ridge,
    true_basis_ridge,
)
from transformer_lens_taskvec.lab.runs import Run, TrainConfig, load_run
from transformer_lens_taskvec.lab.training import PRESETS, TrainingDiverged, evaluate_mixture, train

__all__ = [
    "PRESETS",
    "Batch",
    "Family",
    "LeakyReLU",
    "LinearOnRepresentation",
    "Mixture",
    "MixturePosterior",
    "OracleErrors",
    "RegressionConfig",
    "RegressionEpisode",
    "RegressionFamilies",
    "RegressionTransformer",
    "Run",
    "SparseLinear",
    "SparseLinearMixture",
    "TrainConfig",
    "TrainingDiverged",
    "balanced_labels",
    "bayes_mixture",
    "evaluate_mixture",
    "interleave",
    "lasso",
    "least_squares",
    "linear",
    "load_run",
    "oracle_errors",
    "quadratic",
    "regression_episodes",
    "ridge",
    "train",
    "true_basis_ridge",
]
