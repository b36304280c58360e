"""The lab: small transformers, trained here, in which task vectors can be watched emerging."""

from transformer_lens_taskvec._utils.loggers import (
    Logger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)
from transformer_lens_taskvec.lab import problems
from transformer_lens_taskvec.lab.averaging import BmaGap, bma_gap
from transformer_lens_taskvec.lab.averaging_figures import plot_bma_gap
from transformer_lens_taskvec.lab.emergence import (
    Emergence,
    PosteriorAgreement,
    measure_emergence,
    posterior_agreement,
    swap_matrix,
)
from transformer_lens_taskvec.lab.encoded import encoding_table
from transformer_lens_taskvec.lab.episodes import LabEpisode, problem_episodes
from transformer_lens_taskvec.lab.evaluation import (
    Evaluation,
    OracleErrors,
    evaluate_problem,
    oracle_errors,
)
from transformer_lens_taskvec.lab.figures import emergence_figures, plot_oracles, plot_training
from transformer_lens_taskvec.lab.model import (
    RegressionConfig,
    RegressionTransformer,
    TokenConfig,
    TokenTransformer,
    interleave,
    lengthened,
)
from transformer_lens_taskvec.lab.norms import NormsAndError, norms_and_error, plot_norms
from transformer_lens_taskvec.lab.oracles import (
    MixturePosterior,
    bayes_mixture,
    lasso,
    least_squares,
    noise_mixture,
    ridge,
    true_basis_ridge,
)
from transformer_lens_taskvec.lab.presets import PRESETS, plan_training, train
from transformer_lens_taskvec.lab.problems.base import (
    Batch,
    Family,
    Finding,
    Problem,
    TaskPredictions,
    balanced_labels,
)
from transformer_lens_taskvec.lab.problems.families import (
    LeakyReLU,
    LinearOnRepresentation,
    RegressionFamilies,
    SparseLinear,
    linear,
    quadratic,
)
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.problems.tokens import TokenProblem
from transformer_lens_taskvec.lab.threshold import (
    ThresholdSweep,
    plot_threshold,
    threshold_sweep,
)
from transformer_lens_taskvec.lab.toy.lines import toy_tokenizer
from transformer_lens_taskvec.lab.toy.model import ToyConfig, ToyRun, shipped_toy_run
from transformer_lens_taskvec.lab.training.config_file import load_config
from transformer_lens_taskvec.lab.training.loop import TrainingDiverged
from transformer_lens_taskvec.lab.training.on_problem import Run, TrainConfig, shipped_run
from transformer_lens_taskvec.lab.training.recipe import Recipe
from transformer_lens_taskvec.lab.training.runs import TrainingRun, load_run
from transformer_lens_taskvec.lab.training.stopping import EarlyStopping
from transformer_lens_taskvec.lab.training.vector_loss import VectorLoss
from transformer_lens_taskvec.lab.vector_errors import (
    VectorErrors,
    plot_vector_errors,
    vector_error_by_layer,
)

__all__ = [
    "PRESETS",
    "Batch",
    "BmaGap",
    "EarlyStopping",
    "Emergence",
    "Evaluation",
    "Family",
    "Finding",
    "LabEpisode",
    "LeakyReLU",
    "LinearOnRepresentation",
    "Logger",
    "MixturePosterior",
    "NormsAndError",
    "OracleErrors",
    "PosteriorAgreement",
    "Problem",
    "Recipe",
    "RegressionConfig",
    "RegressionFamilies",
    "RegressionTransformer",
    "Run",
    "SparseLinear",
    "SparseLinearMixture",
    "TaskPredictions",
    "TensorBoardLogger",
    "ThresholdSweep",
    "TokenConfig",
    "TokenProblem",
    "TokenTransformer",
    "ToyConfig",
    "ToyRun",
    "TrackioLogger",
    "TrainConfig",
    "TrainingDiverged",
    "TrainingRun",
    "VectorErrors",
    "VectorLoss",
    "WandbLogger",
    "balanced_labels",
    "bayes_mixture",
    "bma_gap",
    "emergence_figures",
    "encoding_table",
    "evaluate_problem",
    "interleave",
    "lasso",
    "least_squares",
    "lengthened",
    "linear",
    "load_config",
    "load_run",
    "measure_emergence",
    "noise_mixture",
    "norms_and_error",
    "oracle_errors",
    "plan_training",
    "plot_bma_gap",
    "plot_norms",
    "plot_oracles",
    "plot_threshold",
    "plot_training",
    "plot_vector_errors",
    "posterior_agreement",
    "problem_episodes",
    "problems",
    "quadratic",
    "ridge",
    "shipped_run",
    "shipped_toy_run",
    "swap_matrix",
    "threshold_sweep",
    "toy_tokenizer",
    "train",
    "true_basis_ridge",
    "vector_error_by_layer",
]
