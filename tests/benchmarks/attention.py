"""What the model's own fused attention would save, were it to be had through TransformerLens.

python tests/benchmarks/attention.py

TransformerLens 4.3's bridges compute attention step by step whatever ``attn_implementation`` says,
since ``hook_attn_scores`` and ``hook_pattern`` lie inside. So the comparison is of the Hugging Face
model with itself, and of the bridge with both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import transformer_lens_taskvec as tv


def seconds(model: Any, tokens: torch.Tensor, kept: dict[str, torch.Tensor], kind: str) -> float:
    start = time.perf_counter()
    logits = model(tokens, use_cache=False).logits if kind != "bridge" else model(tokens)
    kept[kind] = logits[:, -1]
    return time.perf_counter() - start


def main() -> None:
    hf_model, _ = tv.load_hf_model("smollm2")
    bridge = tv.load_model("smollm2", device="cpu")
    print("| tokens | prompts | eager / sdpa | bridge / sdpa | worst difference in logits |")
    print("|---|---|---|---|---|")
    for length, n_prompts in ((50, 16), (500, 2), (2000, 1)):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(100, 40_000, (n_prompts, length), generator=generator)
        times: dict[str, list[float]] = {"eager": [], "sdpa": [], "bridge": []}
        logits: dict[str, torch.Tensor] = {}
        for _ in range(4):
            for kind, some in times.items():
                if kind != "bridge":
                    hf_model.set_attn_implementation(kind)
                model = bridge if kind == "bridge" else hf_model
                with torch.no_grad():
                    some.append(seconds(model, tokens, logits, kind))
        medians = {kind: statistics.median(some[1:]) for kind, some in times.items()}
        error = max(float((one - logits["eager"]).abs().max()) for one in logits.values())
        print(
            f"| {length} | {n_prompts} | {medians['eager'] / medians['sdpa']:.2f} | "
            f"{medians['bridge'] / medians['sdpa']:.2f} | {error:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
