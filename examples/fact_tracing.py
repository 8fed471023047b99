"""Which training sentences taught a model a fact? Estimators compared by MRR and Recall@k ([MS] section 5).

    python examples/fact_tracing.py [--data PATH] [--facts 300] [--model tiny|smollm2] [--quick]

Every fact stands in the training text in two wordings; a model is trained on it, and asked for the fact in a third
wording. Whoever ranks the two sentences first wins. PATH is a folder with LAMA and ParaRel (`trex/P19.jsonl` with
sub_label and obj_label, `patterns/P19.jsonl` with pattern), or a JSON lines file of your own: a line for each fact with
`prompt`, `answer` and a list `statements`. Without it facts are made on the spot. Facts of subjects that have several
come first, as only these can be taken for each other by their words. `--quick` takes few facts and steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from instruction_pool import PadRight
from smollm2 import load_smollm2
from study_model import tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader, Dataset
from transformers.utils.logging import disable_progress_bar

from lightning_influence import (
    EKFAC,
    BM25Filter,
    GradientDot,
    InfluenceFunction,
    LanguageModelLoss,
    Lexical,
    RepresentationSimilarity,
    TwoStage,
    evaluate_fact_tracing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDINGS = 2  # in which each fact stands in the training text

PEOPLE = ("Ada", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kemal", "Lucia")
MADE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "born": (
        ("[X] was born in [Y].", "[Y] is the birthplace of [X].", "[X] is a native of [Y]."),
        ("Lisbon", "Oslo", "Cairo", "Lima", "Quebec", "Kyoto", "Riga", "Tunis"),
    ),
    "work": (
        ("[X] works as a [Y].", "the [Y] is called [X].", "by profession [X] is a [Y]."),
        ("baker", "pilot", "judge", "painter", "farmer", "dentist", "diver", "printer"),
    ),
    "plays": (
        ("[X] plays the [Y].", "the [Y] is what [X] practises.", "on stage [X] is heard on the [Y]."),
        ("cello", "organ", "flute", "harp", "banjo", "tuba", "oboe", "drum"),
    ),
    "speaks": (
        ("[X] grew up with [Y].", "[Y] is the mother tongue of [X].", "at home [X] speaks [Y]."),
        ("Welsh", "Czech", "Hindi", "Greek", "Danish", "Farsi", "Malay", "Basque"),
    ),
}


@dataclass(frozen=True)
class Fact:
    """What is asked, and the training sentences that say it."""

    prompt: str
    answer: str
    statements: tuple[str, ...]
    subject: str = ""


class Sentences(Dataset[dict[str, Any]]):
    """Tokens and text; a loss on all tokens, or on those after the prompt alone."""

    def __init__(self, rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Any]:
        prompt, rest = self.rows[k]
        before = self.tokenizer(prompt, add_special_tokens=False).input_ids
        after = self.tokenizer(f" {rest}" if prompt else rest, add_special_tokens=False).input_ids
        labels = torch.tensor([-100] * len(before) + after)
        return {"input_ids": torch.tensor(before + after), "labels": labels, "text": f"{prompt} {rest}".strip()}


def worded(subject: str, answer: str, patterns: Sequence[str], draw: random.Random) -> Fact | None:
    """A fact in three wordings, the one that ends with the answer for the question; None if there are too few."""
    asks = [p for p in patterns if p.rstrip(" .").endswith("[Y]") and "[X]" in p]
    if not asks:
        return None
    asked = draw.choice(asks)
    others = sorted({p for p in patterns if p != asked and "[X]" in p and "[Y]" in p})
    if len(others) < WORDINGS:
        return None
    said = [p.replace("[X]", subject).replace("[Y]", answer) for p in draw.sample(others, WORDINGS)]
    prompt = asked.rstrip(" .").removesuffix("[Y]").replace("[X]", subject).strip()
    return Fact(prompt, answer, tuple(said), subject)


def made_facts(draw: random.Random) -> list[Fact]:
    """Every person and relation."""
    found = [worded(who, draw.choice(values), patterns, draw) for who in PEOPLE for patterns, values in MADE.values()]
    return [fact for fact in found if fact is not None]


def json_lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def lama_facts(folder: Path, draw: random.Random) -> list[Fact]:
    """Of all relations that have wordings enough; of a subject with two objects in a relation, the first.

    Raises:
        ValueError: If there is none.
    """
    found = []
    for file in sorted((folder / "patterns").glob("*.jsonl")):
        patterns = [row["pattern"] for row in json_lines(file)]
        objects: dict[str, str] = {}
        for row in json_lines(folder / "trex" / file.name):
            objects.setdefault(row["sub_label"], row["obj_label"])
        found += [worded(subject, answer, patterns, draw) for subject, answer in objects.items()]
    facts = [fact for fact in found if fact is not None]
    if not facts:
        raise ValueError(f"{folder}: expected trex/*.jsonl and patterns/*.jsonl with three wordings of a relation.")
    return facts


def own_facts(file: Path) -> list[Fact]:
    """Of a JSON lines file.

    Raises:
        ValueError: If a line is not complete.
    """
    found = []
    for number, row in enumerate(json_lines(file), start=1):
        said = row.get("statements") if isinstance(row, dict) else None
        if not (isinstance(said, list) and said and all(isinstance(row.get(key), str) for key in ("prompt", "answer"))):
            raise ValueError(f"{file}, fact {number}: expected `prompt`, `answer` and a list `statements`.")
        found.append(Fact(row["prompt"], row["answer"], tuple(map(str, said)), str(row.get("subject", ""))))
    return found


def facts_for(options: argparse.Namespace) -> list[Fact]:
    """As many as are asked for, those of subjects with several facts first.

    Raises:
        ValueError: If there are too few.
    """
    draw = random.Random(options.seed)
    if options.data is None:
        facts = made_facts(draw)
    else:
        facts = lama_facts(options.data, draw) if options.data.is_dir() else own_facts(options.data)
    draw.shuffle(facts)
    counts = Counter(fact.subject for fact in facts)
    facts.sort(key=lambda fact: (-counts[fact.subject], fact.subject))  # stable: order of the draw within a subject
    if len(facts) < options.facts:
        raise ValueError(f"expected {options.facts} facts, there are {len(facts)}. Lower --facts.")
    return facts[: options.facts]


def load(options: argparse.Namespace, texts: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2; or a tiny model whose tokens are the words of the texts."""
    if options.model == "smollm2":
        return load_smollm2(options.cache)
    tokenizer = tiny_tokenizer(texts)
    return tiny_model(tokenizer, options.seed), tokenizer


def train(model: PreTrainedModel, rows: DataLoader[Any], options: argparse.Namespace) -> None:
    """Adam, the rate falling to 0."""
    optimizer, loss, done = torch.optim.Adam(model.parameters(), lr=options.rate), LanguageModelLoss("mean"), 0
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    model.train()
    while done < options.steps:
        for batch in rows:
            optimizer.zero_grad()
            loss.losses(model, batch).mean().backward()
            optimizer.step()
            falling.step()
            done += 1
            if done == options.steps:
                break
    optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def known(model: PreTrainedModel, queries: DataLoader[Any]) -> float:
    """Share of the answers whose every token is the most likely one."""
    right = 0
    for batch in queries:
        best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right += int(((best == labels) | (labels == -100)).all(1).sum())
    return right / len(queries.dataset)  # type: ignore[arg-type]


def estimators(model: PreTrainedModel, train_rows: DataLoader[Any], options: argparse.Namespace) -> dict[str, Any]:
    """By name; the curvature is fitted when its turn comes."""
    ekfac = InfluenceFunction(model, EKFAC(seed=options.seed), components="mlp")
    return {
        "BM25": lambda: Lexical(BM25Filter, "text"),
        "RepSim": lambda: RepresentationSimilarity(model, "model.norm"),
        "GDP": lambda: GradientDot(model, components="mlp"),
        "GDP, cosine": lambda: GradientDot(model, components="mlp", normalise=True),
        "EK-FAC": lambda: ekfac.fit(train_rows),
        f"EK-FAC, {options.candidates} by BM25": lambda: TwoStage(BM25Filter, ekfac, options.candidates, "text"),
    }


def traced(options: argparse.Namespace, facts: Sequence[Fact]) -> dict[str, Any]:
    """Train, score with every estimator, measure; prints as it goes."""
    statements = [("", text) for fact in facts for text in fact.statements]
    asked = [(fact.prompt, fact.answer) for fact in facts]
    model, tokenizer = load(options, [" ".join(row).strip() for row in statements + asked])
    pad = PadRight(tokenizer.pad_token_id)
    order = torch.Generator().manual_seed(options.seed)
    shuffled = DataLoader(Sentences(statements, tokenizer), 16, shuffle=True, collate_fn=pad, generator=order)
    rows, queries = (DataLoader(Sentences(part, tokenizer), 32, collate_fn=pad) for part in (statements, asked))
    before = known(model, queries)
    seconds, _ = timed(lambda: train(model, shuffled, options))
    print(
        f"{len(facts)} facts in {len(statements)} sentences; {options.steps} steps of training in {seconds:.0f} s; "
        f"answers known {before:.0%} before, {known(model, queries):.0%} after",
        flush=True,
    )
    scores, times = {}, {}
    for name, make in estimators(model, rows, options).items():
        times[name], scores[name] = timed(lambda make=make: make().score(queries, rows))
    firsts = [sum(len(fact.statements) for fact in facts[:k]) for k in range(len(facts))]
    relevant = {k: range(firsts[k], firsts[k] + len(fact.statements)) for k, fact in enumerate(facts)}
    report = evaluate_fact_tracing(scores, relevant, at=(1, 10), seed=options.seed)
    print(f"\n{report.table()}\n")
    print("seconds:", ", ".join(f"{name} {value:.1f}" for name, value in times.items()))
    return {line.name: {key: round(value, 4) for key, value in line.measures.items()} for line in report.lines}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with trex/ and patterns/, or a JSON lines file of facts")
    parser.add_argument("--facts", type=int, help="48 made ones, or 300 of the data")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--steps", type=int, help="of the training, 16 sentences each: 400, or 60 for smollm2")
    parser.add_argument("--rate", type=float, help="first learning rate: 3e-3, or 5e-5 for smollm2")
    parser.add_argument("--candidates", type=int, default=50, help="of the filter, for the search in two stages")
    parser.add_argument("--quick", action="store_true", help="16 facts and 200 steps")
    parser.add_argument("--seed", type=int, default=0, help="of facts, order and tiny model")
    parser.add_argument("--cache", type=Path, default=Path("runs/models"), help="folder for the weights of smollm2")
    options = parser.parse_args(arguments)
    small = options.model == "tiny"
    if options.facts is None:
        options.facts = 16 if options.quick else 48 if options.data is None else 300
    if options.steps is None:
        options.steps = 200 if options.quick else 400 if small else 60
    if options.rate is None:
        options.rate = 3e-3 if small else 5e-5
    if min(options.facts, options.steps, options.candidates) < 1:
        parser.error("expected --facts, --steps and --candidates >= 1")
    if options.data is not None and not options.data.exists():
        parser.error(f"expected --data to be a folder or a file, {options.data} is none")
    options.candidates = min(options.candidates, WORDINGS * options.facts)
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(options.seed)
    try:
        found = traced(options, facts_for(options))
    except ValueError as error:
        sys.exit(f"fact_tracing.py: {error}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.facts} queries; peak memory {peak:.0f} MiB")
    print("RESULT", json.dumps({"queries": options.facts, **found}))


if __name__ == "__main__":
    main(sys.argv[1:])
