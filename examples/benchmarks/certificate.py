"""How far the greedy choice can be from the best one: certified gaps, with their time.

    python examples/benchmarks/certificate.py [--quick] [--data DIR] [--rows 2000]

digits: the pool of 1000 of `digits_demo.py`, a fifth with wrong labels, at its warm-up model. instructions: rows of
Alpaca under a Llama of 260,000 parameters that was trained on stories, as far as DIR (LI_DATA unless given) has
alpaca/alpaca_cleaned.jsonl.gz and stories260k/hf; 100 other rows are the targets. Both with unit gradients whitened by
EK-FAC and the weight of a row at which the gain lasts as long as the budget, which is what `DataSelector` does.

The gap is what the best choice of as many rows can win at most, as a share of what the greedy one is predicted to gain;
it includes what choosing rows in part gains (`certify`). Seconds are those of the processor with one thread.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from padding import IGNORED, Row, padded
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_influence import (
    EKFAC,
    CurvatureRecorder,
    DataSelector,
    InfluenceFunction,
    InteractionGreedy,
    Interactions,
    LanguageModelLoss,
    certify,
)
from lightning_influence.selection.pipeline import resolve_weight

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other examples

from digits_demo import BATCH, Digits, baseline_scores, fit, silence

SHARES = (0.05, 0.1, 0.2)
LONGEST = 256  # tokens of a row


def digits(args: argparse.Namespace) -> Interactions:
    silence()
    data = Digits.split(0.2, 0)
    with tempfile.TemporaryDirectory() as folder:
        recorder = CurvatureRecorder(EKFAC(), dirpath=folder)
        warm = fit(DataSelector(data.pool, batch_size=BATCH), 30, 1000, recorder)
        return baseline_scores(warm, recorder.records[-1], data)


def instructions(args: argparse.Namespace) -> Interactions:
    model = AutoModelForCausalLM.from_pretrained(args.data / "stories260k" / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.data / "stories260k" / "hf")
    rows = []
    with gzip.open(args.data / "alpaca" / "alpaca_cleaned.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in itertools.islice(file, args.rows + 100):
            row = json.loads(line)
            prompt = tokenizer("\n".join(filter(None, (row["instruction"], row["input"])))).input_ids[: LONGEST // 2]
            answer = tokenizer(row["output"], add_special_tokens=False).input_ids[: LONGEST // 2]
            labels = torch.tensor([IGNORED] * len(prompt) + answer)
            rows.append({"input_ids": torch.tensor(prompt + answer), "labels": labels})
    pool, targets = (loader(part) for part in (rows[: args.rows], rows[args.rows :]))
    estimator = InfluenceFunction(
        model, EKFAC(), LanguageModelLoss(), "all-linear", normalise=True, batch_size=16, progress=False
    )
    return Interactions.from_scores(estimator.fit(loader(rows[: args.rows // 4])).score(targets, pool))


def loader(rows: list[Row]) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=16, collate_fn=padded)  # type: ignore[arg-type]


def measured(name: str, interactions: Interactions, share: float) -> dict[str, Any]:
    """One line, printed and returned."""
    budget = round(share * len(interactions))
    rule = InteractionGreedy()
    weighed = interactions.reweighted(resolve_weight(interactions, rule, budget, "saturate"))
    parts = (weighed.values, weighed.features, weighed.metric)
    begun = clock()
    selection = rule.select(*parts, budget=budget, ids=weighed.ids)
    greedy = clock() - begun
    begun = clock()
    certified = certify(selection, *parts, ids=weighed.ids)
    assert certified.optimality_gap is not None
    row = {
        "pool": name,
        "rows": len(interactions),
        "budget": budget,
        "objective": certified.objective,
        "lower_bound": certified.lower_bound,
        "gap": certified.optimality_gap / abs(certified.objective),
        "greedy_s": greedy,
        "certificate_s": clock() - begun,
    }
    row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
    print(row, flush=True)
    return row


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest budget, 200 instructions")
    parser.add_argument("--data", type=Path, default=os.environ.get("LI_DATA"), help="folder with the data sets")
    parser.add_argument("--rows", type=int, default=2000, help="of the pool of instructions")
    args = parser.parse_args()
    if args.quick:
        args.rows = 200
    warnings.filterwarnings("ignore", ".*too few positions")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # rows are cut after they are counted
    pools: dict[str, Callable[[argparse.Namespace], Interactions]] = {"digits": digits}
    if args.data is not None:
        pools["instructions"] = instructions
    found = []
    for name, pool in pools.items():
        interactions = pool(args)
        found += [measured(name, interactions, share) for share in SHARES[: 1 if args.quick else None]]
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
