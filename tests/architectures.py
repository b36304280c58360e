"""Small models of every architecture, and how the library's numbers compare with theirs.

The reference is the plain model of ``transformers``, one unpadded prompt at a time, edited by torch
hooks on its decoder blocks: nothing of TransformerLens or of this library takes part in it.

python tests/architectures.py gpt_neo mamba  # some rows
python tests/architectures.py --table        # all, as Markdown
python tests/architectures.py --write        # into tutorials/pages/architectures.md
"""

from __future__ import annotations

import argparse
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models import prefixes

PAGE = Path(__file__).parents[1] / "tutorials" / "pages" / "architectures.md"
VOCABULARY, WIDTH, LAYERS = 512, 64, 4
WINDOW = 16
"""Of sliding and local attention, and of chunks."""
SWITCH = 32
"""Where rope changes with the length."""
LENGTHS = (4, 7, 10, 14, 20, 29, 34, 41, 68, 130)
"""Of the prompts, ascending: around the window and the switch, and far beyond them."""
EDITED = (0, LAYERS // 2, LAYERS - 1)
TOLERANCE = 1e-3
"""In nats, and in standard deviations of activations."""

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "word_embed_proj_dim": WIDTH,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,  # rope goes by head_dim
    "v_head_dim": 16,
    # state spaces and linear attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
"""Sizes, given to every configuration that has an attribute of the name."""

SCALE = 6.0
"""Of the weights: with the usual initialisation attention hardly matters."""
STATEFUL = ("A_log", "dt_", "conv1d", "x_proj", "time_", "rg_lru", "norm.w", ".conv.conv")
"""Parts of the names of parameters whose scale is not free."""
WINDOWED = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW}
MIXED = ["full_attention", "sliding_attention"] * (LAYERS // 2)
LONG = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": SWITCH}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 10000.0, "factor": 4.0},
    "yarn": LONG,
    "llama3": {**LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "rope_theta": 10000.0,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0 + 0.2 * i for i in range(8)],
        "long_factor": [4.0 + 2.0 * i for i in range(8)],
    },
}
"""Parameters of rope, by its type."""

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_d_conv": 4,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "num_key_value_heads": 4,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
    },
    "granitemoehybrid": {
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            **LONG,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 96, "new_decoder_architecture": True},
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 96,
        "floor_scale": WINDOW,
        "attn_scale": 0.5,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": WINDOW},
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "recurrent_gemma": {"lru_width": WIDTH, "attention_window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "rwkv": {"attention_hidden_size": WIDTH},
    "hrm_text": {"num_layers_per_stack": 2},
    "phi3": {"pad_token_id": 0},
    "jetmoe": {"kv_channels": 16},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
    "laguna": {
        "layer_types": MIXED,
        "sliding_window": WINDOW,
        "num_attention_heads_per_layer": [4] * LAYERS,
    },
    "glm_moe_dsa": {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2},
}
"""Sizes that have other names or need other values, by the type of model."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"llama, rope {kind}": (
            "LlamaForCausalLM",
            {
                "rope_parameters": {"rope_type": kind, **parameters},
                "max_position_embeddings": SWITCH,
            },
        )
        for kind, parameters in ROPES.items()
    },
    "phi3, rope longrope": (
        "Phi3ForCausalLM",
        {
            "rope_parameters": {"rope_type": "longrope", **ROPES["longrope"]},
            "original_max_position_embeddings": SWITCH,
            "sliding_window": None,
        },
    ),
    "llama, rope dynamic, no switch": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", **ROPES["dynamic"]}},
    ),
    "mistral, no window": ("MistralForCausalLM", {"sliding_window": None}),
    **{
        f"{model_type}, window": (f"{name}ForCausalLM", {**WINDOWED, **changes})
        for model_type, name, changes in (
            ("mixtral", "Mixtral", {}),
            ("phi3", "Phi3", {}),
            ("qwen2", "Qwen2", {"layer_types": MIXED}),
            ("qwen2_moe", "Qwen2Moe", {"layer_types": MIXED}),
            ("qwen3", "Qwen3", {"layer_types": MIXED}),
            ("qwen3_moe", "Qwen3Moe", {}),
            ("smollm3", "SmolLM3", {"layer_types": MIXED}),
            ("starcoder2", "Starcoder2", {}),
        )
    },
    **{
        f"{model_type}, wide window": (f"{name}ForCausalLM", {"sliding_window": 4096})
        for model_type, name in (
            ("cohere2", "Cohere2"),
            ("gemma2", "Gemma2"),
            ("gemma3_text", "Gemma3"),
            ("gpt_oss", "GptOss"),
            ("olmo3", "Olmo3"),
        )
    },
    "llama4_text, wide chunks": (
        "Llama4ForCausalLM",
        {"attention_chunk_size": 4096, "floor_scale": 8192},
    ),
    "gpt_neo, wide window": ("GPTNeoForCausalLM", {"window_size": 256}),
    "gpt_bigcode, heads": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "opt, projected": ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
    "stablelm, parallel": (
        "StableLmForCausalLM",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "falcon, ALiBi": (
        "FalconForCausalLM",
        {
            "alibi": True,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "num_kv_heads": 4,
        },
    ),
    "falcon, one KV head": (
        "FalconForCausalLM",
        {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    ),
    "gpt_neo, global": (
        "GPTNeoForCausalLM",
        {"attention_types": [[["global"], LAYERS]]},
    ),
    "gpt_neox, sequential": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "granite, multipliers": (
        "GraniteForCausalLM",
        {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    ),
    "opt, norm after": ("OPTForCausalLM", {"do_layer_norm_before": False}),
}
"""Rows beside the one of each architecture, whose attention differs."""


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        word: ``"agrees"`` (packed), ``"falls back"`` (one variant at a time for some prompts, with
            the warning), ``"refused"`` (a ``ValueError``), ``"not built"``, ``"differs"``, or
            ``"fails"`` (another error).
        why: The warning, the error, or what differs.
        error: The largest difference from the reference in NLL, in nats.
        bridge: That of TransformerLens' bridge by itself from ``transformers``; beyond the
            tolerance the bridge is the reference.
    """

    word: str
    why: str = ""
    error: float = 0.0
    bridge: float = 0.0

    @property
    def bridge_differs(self) -> bool:
        """Whether TransformerLens' bridge by itself is not the model of ``transformers``."""
        return self.bridge > TOLERANCE

    @property
    def outcome(self) -> str:
        """The word, and whether the bridge differs, as in the committed table."""
        return self.word + (", bridge differs" if self.bridge_differs else "")


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return each row's class in ``transformers`` and its changes to the small configuration."""
    plain = {model_type(name): (name, {}) for name in SUPPORTED_ARCHITECTURES if is_row(name)}
    return dict(sorted({**plain, **VARIANTS}.items()))


def is_row(architecture: str) -> bool:
    """Whether it is a decoder-only language model whose class is in ``transformers``."""
    ends = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return ends and not architecture.startswith("Bert") and hasattr(transformers, architecture)


def model_type(architecture: str) -> str:
    return str(getattr(transformers, architecture).config_class.model_type)


def hf_model(architecture: str, changes: Mapping[str, Any]) -> Any:
    """Return a small random model whose attention, biases and norms matter."""
    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    usual = config_class()
    known = usual.to_dict()
    sizes = {name: SMALL[name] for name in SMALL if name in {*known, *usual.attribute_map}}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if known.get("sliding_window") is None:
        sizes.pop("sliding_window", None)
    for name, value in known.items():
        if name.endswith("layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            sizes[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
    config = config_class(**{**sizes, **SPECIAL.get(config_class.model_type, {}), **changes})
    config.architectures = [architecture]
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                last = name.rsplit(".", 1)[-1]
                if any(part in name for part in STATEFUL):
                    continue
                if parameter.ndim > 1:
                    parameter.mul_(SCALE)
                elif last in ("weight", "bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(torch.float32)


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """Return a plain model's decoder blocks."""
    n = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {n} blocks")


def tokenizer() -> Any:
    """Return a tokenizer whose words are the numbers of its tokens."""
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<0>",
        unk_token="<0>",
        bos_token="<1>",
        eos_token="<2>",
        add_bos_token=True,  # or TransformerLens would load another of the name
        name_or_path="numbers",
        padding_side="left",
    )


Edit = tuple[str, int, Tensor]
"""A mode, a layer and a vector."""


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def episode(self) -> tv.Episode:
        x, y = (" ".join(f"<{token}>" for token in ids) for ids in (self.prompt, self.answer))
        return tv.Episode("numbers", (), tv.Example(x, y), tv.PromptTemplate("{x} {y}", bos=False))


def questions() -> list[Question]:
    """Prompts of ascending length that begin alike, with answers of one to three tokens."""
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(n))

    common = tokens(max(LENGTHS))
    return [
        Question(common[: n // 2] + tokens(n - n // 2), tokens(1 + index % 3))
        for index, n in enumerate(LENGTHS)
    ]


def edits() -> list[Edit | None]:
    """No edit, and replacing and adding at several layers."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(EDITED), WIDTH, generator=generator)
    return [
        None,
        *(
            (mode, layer, vector)
            for mode in ("replace", "add")
            for layer, vector in zip(EDITED, vectors, strict=True)
        ),
    ]


def change(stream: Tensor, edit: Edit, at: int) -> Tensor:
    """Return a copy of the residual stream with the edit at one position."""
    mode, _, vector = edit
    edited = stream.clone()
    edited[:, at] = vector if mode == "replace" else edited[:, at] + vector
    return edited


Answers = dict[str, Tensor]
"""``nll`` and ``correct``, ``[edit, question]``, and ``resid``, ``[question, layer, d]``."""


def answers_by(run: Callable[..., tuple[Tensor, list[Tensor]]]) -> Answers:
    """Return the answers of a model that runs one prompt with one edit."""
    nll, correct, resid = [], [], []
    # Ascending: rope that changes with the length keeps the longest that it has seen.
    for question in questions():
        at = len(question.prompt) - 1
        _, stream = run(torch.tensor([question.prompt]), None, at)
        resid.append(torch.stack([block[0, at] for block in stream]))
        tokens = torch.tensor([question.prompt + question.answer[:-1]])
        answer = torch.tensor(question.answer)
        logits = torch.stack([run(tokens, edit, at)[0][0, at:].float() for edit in edits()])
        own = logits.log_softmax(-1)[:, range(len(answer)), answer]
        nll.append(-own.sum(-1))
        correct.append((logits.argmax(-1) == answer).all(-1))
    return {
        "nll": torch.stack(nll, 1),
        "correct": torch.stack(correct, 1),
        "resid": torch.stack(resid),
    }


def run_plain(
    model: Any, tokens: Tensor, edit: Edit | None, at: int
) -> tuple[Tensor, list[Tensor]]:
    """Run a model of ``transformers`` with torch hooks on its blocks."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int, module: Any, args: Any, output: Any) -> Any:
        stream = output if isinstance(output, Tensor) else output[0]
        if edit is not None and edit[1] == layer:
            stream = change(stream, edit, at)
        seen[layer] = stream
        return stream if isinstance(output, Tensor) else type(output)([stream, *output[1:]])

    with ExitStack() as stack:
        for layer, block in enumerate(blocks_of(model)):
            handle = block.register_forward_hook(partial(hook, layer))
            stack.callback(handle.remove)
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits, [seen[layer] for layer in sorted(seen)]


class MissingHook(Exception):
    """A hook point that exists and is never called."""


def run_bridge(
    model: Any, tokens: Tensor, edit: Edit | None, at: int
) -> tuple[Tensor, list[Tensor]]:
    """Run TransformerLens' bridge by itself, with hook functions of our own."""
    seen: dict[int, Tensor] = {}

    def hook_function(layer: int, stream: Tensor, hook: Any = None) -> Tensor:
        if edit is not None and edit[1] == layer:
            stream = change(stream, edit, at)
        seen[layer] = stream
        return stream

    hooks = [(f"blocks.{layer}.hook_out", partial(hook_function, layer)) for layer in range(LAYERS)]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
    if len(seen) < LAYERS:
        raise MissingHook(f"blocks.0.hook_out of {type(model.original_model).__name__} never fires")
    return logits, [seen[layer] for layer in sorted(seen)]


def by_library(model: Any) -> Answers:
    episodes = [question.episode() for question in questions()]
    variants = [
        [] if edit is None else [tv.inject(edit[2], edit[1], mode=edit[0])] for edit in edits()
    ]
    scores, activations = [], []
    # In one batch, and in batches of which some fit a window and others do not; with each prompt
    # whole, and with what they begin with run apart, which a model of this size would not save by.
    for tokens, apart in ((None, False), (100, False), (None, True), (100, True)):
        with mock.patch.object(prefixes, "_PASS", 0 if apart else 1 << 40):
            scores += tv.evaluate_many(model, episodes, variants, max_tokens=tokens)
            activations.append(tv.collect(model, episodes).values)
    return {
        "nll": torch.stack([one.loss for one in scores]),
        "correct": torch.stack([one.correct for one in scores]),
        "resid": torch.cat(activations),
    }


def distance(found: Answers, wanted: Answers) -> tuple[float, str]:
    """Return the largest difference in NLL, and what differs beyond the tolerance."""
    times = len(found["nll"]) // len(wanted["nll"])
    nll = (found["nll"] - wanted["nll"].repeat(times, 1)).abs()
    scale = wanted["resid"].std(dim=(0, 2), keepdim=True)
    again = len(found["resid"]) // len(wanted["resid"])
    resid = (found["resid"] - torch.cat([wanted["resid"]] * again)).abs() / scale
    wrong = []
    if not nll.max() < TOLERANCE:
        lengths = sorted({LENGTHS[i] for i in torch.where(~(nll < TOLERANCE))[1].tolist()})
        wrong.append(f"NLL by {float(nll.max()):.2g} nats at {lengths} tokens")
    if not resid.max() < TOLERANCE:
        wrong.append(f"activations by {float(resid.max()):.2g} standard deviations")
    if not wrong and not torch.equal(found["correct"], wanted["correct"].repeat(times, 1)):
        wrong.append("exact match")
    return float(nll.nan_to_num(float("inf")).max()), "; ".join(wrong)


def compare(name: str) -> Row:
    """Build a row's model and compare the library's numbers with the reference's."""
    architecture, changes = rows()[name]
    try:
        hf = hf_model(architecture, changes)
        with torch.no_grad():
            wanted = answers_by(partial(run_plain, hf))
    except Exception as error:  # whatever transformers raises
        return Row("not built", f"transformers: {_said(error)}")
    try:
        model = tv.bridge_from_hf(hf_model(architecture, changes), tokenizer(), device="cpu")
        with torch.no_grad():
            own = answers_by(partial(run_bridge, model))
        bridge, wrong = distance(own, wanted)
    except MissingHook as error:
        bridge, wrong = 0.0, str(error)  # which the library has to notice
    except Exception as error:  # whatever TransformerLens raises
        return Row("not built", f"TransformerLens: {_said(error)}")
    if bridge and wrong:
        bridge, wanted = max(bridge, 2 * TOLERANCE), own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = by_library(model)
        except ValueError as error:
            return Row("refused", _said(error), bridge=bridge)
        except Exception as error:  # a refusal is a ValueError
            return Row("fails", _said(error), bridge=bridge)
    slow = [str(one.message) for one in caught if "one intervention at a time" in str(one.message)]
    error, differs = distance(found, wanted)
    word = "differs" if differs else "falls back" if slow else "agrees"
    return Row(word, differs or (slow[0] if slow else wrong), error, bridge)


def _said(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def table(found: Mapping[str, Row]) -> str:
    """Return the rows as Markdown, with the versions that they hold for."""
    counts = Counter(row.word for row in found.values())
    own = [name for name in SUPPORTED_ARCHITECTURES if hasattr(transformers, name)]
    kinds = sum(is_row(name) for name in own)
    lines = [
        f"{versions()}: {', '.join(f'{n} {word}' for word, n in counts.most_common())}.",
        "",
        f"TransformerLens names {len(SUPPORTED_ARCHITECTURES)} classes. {kinds} of them are "
        "decoder-only language models of `transformers` and have rows, some of them several. "
        f"Not built: {len(own) - kinds} that are not decoder-only language models, and "
        f"{len(SUPPORTED_ARCHITECTURES) - len(own)} without a class of that name in "
        "`transformers`.",
        "",
        "| Model | Class | Outcome | Largest difference (nats) | Why |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        reason = re.search(r"at a time: (.*)\. Results", row.why)
        why = (reason.group(1) if reason else row.why).replace("|", "\\|")
        size = f"{row.error:.0e}" if row.word in ("agrees", "falls back", "differs") else ""
        lines.append(f"| {name} | `{rows()[name][0]}` | {row.outcome} | {size} | {why} |")
    return "\n".join(lines)


def versions() -> str:
    """Return what the table holds for."""
    return f"TransformerLens {version('transformer-lens')}, transformers {transformers.__version__}"


def committed() -> dict[str, str]:
    """Return the outcomes in the page, none of them if it was made with other versions."""
    text = PAGE.read_text()
    found = dict(re.findall(r"^\| ([^|]+?) \| `\w+` \| ([^|]+?) \|", text, re.MULTILINE))
    return found if versions() in text else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--table", action="store_true", help="print Markdown")
    parser.add_argument("--write", action="store_true", help="write all rows into the page")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = {}
    for name in arguments.rows or rows():
        found[name] = row = compare(name)
        if not arguments.table:
            print(f"{name:26} {row.outcome:12} {row.error:.0e} {row.why}", flush=True)
    if arguments.table:
        print(table(found))
    if arguments.write and not arguments.rows:
        head = PAGE.read_text().partition("\nTransformerLens ")[0]
        PAGE.write_text(f"{head}\n{table(found)}\n")


if __name__ == "__main__":
    main()
