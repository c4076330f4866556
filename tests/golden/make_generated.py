"""Greedy continuations by transformers of the golden checkpoints, for the engine's tests. Run it where torch is.

python tests/golden/make_generated.py
"""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
CHECKPOINTS = ("v3_base", "v3_yarn", "v2_greedy", "mtp_1")
LENGTHS = (1, 3, 7, 20, 40, 66, 70, 90)
NEW = 64


def prompts(vocabulary: int) -> list[list[int]]:
    """Eight of different lengths; those longer than a page begin alike."""
    rng = random.Random(0)
    common = [rng.randrange(2, vocabulary) for _ in range(64)]
    rows = [[rng.randrange(2, vocabulary) for _ in range(n)] for n in LENGTHS]
    return [common + row[64:] if len(row) > 64 else row for row in rows]


def main() -> None:
    torch.manual_seed(0)
    answers = {}
    for name in CHECKPOINTS:
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        rows = prompts(model.config.vocab_size)
        new, gaps = [], []
        for row in rows:
            how = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
            out = model.generate(torch.tensor([row]), max_new_tokens=NEW, **how)
            new.append(out.sequences[0, len(row) :].tolist())
            best = torch.stack(out.logits).topk(2, dim=-1).values
            gaps.append((best[..., 0] - best[..., 1]).min().item())
        answers[name] = {"prompts": rows, "new": new, "least_gap": min(gaps)}
        print(name, min(gaps))
    (HERE / "generated.json").write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
