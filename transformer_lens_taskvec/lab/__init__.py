"""The lab: small transformers trained here, in which task vectors can be watched as they emerge."""

from transformer_lens_taskvec.lab.emergence import (
    Emergence,
    PosteriorAgreement,
    emergence,
    posterior_agreement,
    swap_matrix,
)
from transformer_lens_taskvec.lab.episodes import RegressionEpisode, regression_episodes
from transformer_lens_taskvec.lab.figures import emergence_figures
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
    oracle_predictions,
    ridge,
    true_basis_ridge,
)
from transformer_lens_taskvec.lab.recipe import Recipe
from transformer_lens_taskvec.lab.runs import (
    Run,
    TrainConfig,
    evaluate_mixture,
    load_run,
    shipped_run,
)
from transformer_lens_taskvec.lab.toy import ToyConfig, ToyRun, load_toy_run, shipped_toy_run
from transformer_lens_taskvec.lab.toy_lines import toy_tokenizer
from transformer_lens_taskvec.lab.training import PRESETS, TrainingDiverged, train

__all__ = [
    "PRESETS",
    "Batch",
    "Emergence",
    "Family",
    "LeakyReLU",
    "LinearOnRepresentation",
    "Mixture",
    "MixturePosterior",
    "OracleErrors",
    "PosteriorAgreement",
    "Recipe",
    "RegressionConfig",
    "RegressionEpisode",
    "RegressionFamilies",
    "RegressionTransformer",
    "Run",
    "SparseLinear",
    "SparseLinearMixture",
    "ToyConfig",
    "ToyRun",
    "TrainConfig",
    "TrainingDiverged",
    "balanced_labels",
    "bayes_mixture",
    "emergence",
    "emergence_figures",
    "evaluate_mixture",
    "interleave",
    "lasso",
    "least_squares",
    "linear",
    "load_run",
    "load_toy_run",
    "oracle_errors",
    "oracle_predictions",
    "posterior_agreement",
    "quadratic",
    "regression_episodes",
    "ridge",
    "shipped_run",
    "shipped_toy_run",
    "swap_matrix",
    "toy_tokenizer",
    "train",
    "true_basis_ridge",
]
