"""A peer's own code on work that comes in a file, in whatever environment Python was started in.

    python run_peer.py PEER MODEL_FOLDER WORK.npz RESULT.npz DEVICE

It loads the model, warms up, and prints one line of JSON with the versions of what it runs. For
each line on standard input it then does the work once, writes the result, and prints the seconds
that the work took. It imports nothing of this repository: the peer's environment need not have it.

The work is a layer sweep: ``tokens`` and ``mask`` ``[row, pos]``, prompts left-padded to ``width``
tokens and followed by their answers; ``answers`` ``[row, answer_pos]``, -1 after an answer's end;
``vectors`` ``[layer, d_model]``, each to replace the residual stream after its block at the last
prompt token. The result is ``loss``, ``correct`` and ``logit`` (of the answer's first token), each
``[layer, row]``.

Every peer gets what its users have that makes it faster: the attention that transformers chooses,
and logits only where answers are predicted.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Work:
    """A layer sweep on one batch."""

    tokens: Tensor
    mask: Tensor
    width: int
    answers: Tensor
    vectors: Tensor

    @property
    def at(self) -> int:
        """The position of the last prompt token."""
        return self.width - 1

    @property
    def n_predicted(self) -> int:
        """The number of positions whose logits are needed."""
        return self.tokens.shape[1] - self.at

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with, positions counted from each row's first token."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": self.tokens,
            "attention_mask": self.mask,
            "position_ids": positions,
        }


Sweep = Iterator[Tensor]
"""The logits ``[row, answer_pos, vocab]`` of each layer's answers."""


def nnsight(model: Any, work: Work) -> Sweep:
    """One trace per layer."""
    lm = _language_model(model)
    for layer, vector in enumerate(work.vectors):
        with lm.trace(work.inputs, logits_to_keep=work.n_predicted):
            lm.model.layers[layer].output[:, work.at] = vector
            logits = lm.lm_head.output.save()
        yield logits


def nnsight_batched(model: Any, work: Work) -> Sweep:
    """All layers as invokes of one trace, which runs them as one batch."""
    lm = _language_model(model)
    with lm.trace(logits_to_keep=work.n_predicted) as tracer:
        found = [].save()
        for layer, vector in enumerate(work.vectors):
            with tracer.invoke(work.inputs):
                lm.model.layers[layer].output[:, work.at] = vector
                found.append(lm.lm_head.output)
    yield from found


def _language_model(model: Any) -> Any:
    from nnsight import LanguageModel

    file = os.path.join(model.config.name_or_path, "tokenizer.json")
    return LanguageModel(model, tokenizer=PreTrainedTokenizerFast(tokenizer_file=file))


def steering_vectors(model: Any, work: Work) -> Sweep:
    """One applied vector per layer; an operator makes it replace what it is added to."""
    from steering_vectors import SteeringVector

    for layer, vector in enumerate(work.vectors):
        steering = SteeringVector({layer: vector})
        with steering.apply(
            model,
            operator=lambda old, new: new - old,
            min_token_index=None,  # its default excludes token_indices
            token_indices=[work.at],
        ):
            yield _logits(model, work)


def repeng(model: Any, work: Work) -> Sweep:
    """One controlled layer at a time; an operator confines it to the last prompt token."""
    from repeng import ControlModel

    def replaced(current: Tensor, control: Tensor) -> Tensor:
        current = current.clone()
        current[:, work.at] = control[:, work.at] if control.shape[1] > 1 else control[:, 0]
        return current

    for layer, vector in enumerate(work.vectors):
        controlled = ControlModel(model, [layer])
        try:
            controlled.set_raw_control({layer: vector}, operator=replaced)
            yield _logits(controlled, work)
        finally:
            controlled.unwrap()


def hugging_face(model: Any, work: Work) -> Sweep:
    """A forward hook per layer behind the prompts' KV cache; the first answer token only."""
    from transformers import DynamicCache

    prefix = {name: value[:, : work.at] for name, value in work.inputs.items()}
    last = {name: value[:, work.at : work.width] for name, value in work.inputs.items()}
    last["attention_mask"] = work.mask[:, : work.width]
    cache = DynamicCache()
    model.model(**prefix, past_key_values=cache)
    for layer, vector in enumerate(work.vectors):
        handle = model.model.layers[layer].register_forward_hook(_replacing(vector))
        try:
            yield model(**last, past_key_values=cache).logits
        finally:
            handle.remove()
            cache.crop(-1)


def _replacing(vector: Tensor) -> Callable[..., Any]:
    def hook(block: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] = vector
        return output

    return hook


def _logits(model: Any, work: Work) -> Tensor:
    return model(**work.inputs, use_cache=False, logits_to_keep=work.n_predicted).logits


PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Sweep]]] = {
    "nnsight": (("nnsight",), nnsight),
    "nnsight_batched": (("nnsight",), nnsight_batched),
    "steering_vectors": (("steering-vectors",), steering_vectors),
    "repeng": (("repeng",), repeng),
    "hugging_face": ((), hugging_face),
}
"""By name, the packages that a peer needs besides torch and transformers, and its sweep."""


def scores(logits: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """The loss, the correctness and the first token's logit of every answer."""
    logits = logits[:, : answers.shape[1]].float()
    answers = answers[:, : logits.shape[1]]
    asked = answers >= 0
    targets = answers.clamp(min=0)[..., None]
    nll = -logits.log_softmax(-1).gather(2, targets)[..., 0]
    return {
        "loss": (nll * asked).sum(1),
        "correct": ((logits.argmax(-1) == answers) | ~asked).all(1),
        "logit": logits.gather(2, targets)[:, 0, 0],
    }


@torch.no_grad()
def run(sweep: Callable[..., Sweep], model: Any, work: Work) -> dict[str, Any]:
    """The sweep's result, on the CPU."""
    each = [scores(logits, work.answers) for logits in sweep(model, work)]
    return {name: torch.stack([one[name] for one in each]).cpu().numpy() for name in each[0]}


def _model(folder: str) -> Any:
    """The model of a folder that transformers 5 wrote, under transformers 4 or 5."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        rotary = json.load(file).get("rope_parameters", {})
    if "rope_theta" in rotary:  # transformers 4 has it here, and its default where it has none
        config.rope_theta = rotary["rope_theta"]
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True
    )


def main() -> None:
    """Do the work once for each line on standard input."""
    peer, folder, work_file, result_file, device = sys.argv[1:]
    # What libraries print must not come between our lines.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    packages, sweep = PEERS[peer]
    named = (*packages, "transformers", "torch")
    versions = {name: importlib.metadata.version(name) for name in named}
    model = _model(folder).to(device)
    with np.load(work_file) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    width = int(arrays.pop("width"))
    work = Work(width=width, **{name: value.to(device) for name, value in arrays.items()})
    few = {name: getattr(work, name)[:2] for name in ("tokens", "mask", "answers")}
    run(sweep, model, replace(work, **few, vectors=work.vectors[:2]))
    print(json.dumps(versions), file=replies, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        found = run(sweep, model, work)
        taken = time.perf_counter() - start
        np.savez(result_file, **found)
        print(taken, file=replies, flush=True)


if __name__ == "__main__":
    main()
