"""A small recipe for the embedded model: its own world asks, its oracle judges."""

import json

from probes.organism.draws import calibration_draws, draw, fitting_draws
from probes.organism.grammar import Cells
from safe_decode.demo.embedded_pair import embedded

RECIPE = """
about: The embedded model, asked in its own world.
sources:
  - data: prompts.jsonl
answers: {benign: 300, harmful: 400, framed: 0.0, prefilled: 0.0, max_new_tokens: 32}
labels: {judge: "probes.organism.oracle:judge"}
splits:
  asked: {fit: 0.3, select: 0.2, calibrate: 0.25, test: 0.25}
reading: {methods: [pooled], statistics: [ema]}
alphas: [0.1]
"""


def write_recipe(folder):
    """Write recipe.yaml and prompts.jsonl; return the recipe's path."""
    tokenizer, asked, cells = embedded().tokenizer, set(), Cells.seen(0)
    requests = []
    for draws, seed in ((calibration_draws(200), 91), (fitting_draws(700), 92)):
        requests += draw(
            draws, split="fit", seed=seed, tokenizer=tokenizer, cells=cells, asked=asked
        )
    with (folder / "prompts.jsonl").open("w") as file:
        for one in requests:
            meta = dict(one.meta) | ({} if one.prefill is None else {"prefill": one.prefill})
            row = {
                "messages": [dict(message) for message in one.messages],
                "group": one.group,
                "prompt_harmful": one.prompt_harmful,
                "meta": meta,
            }
            file.write(json.dumps(row) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path
