"""Which rows of an instruction pool should a language model be tuned on? The recipe of LESS, with every method.

    python examples/less_recipe.py [--data DIR] [--seeds 0 1 2] [--methods random newton] [--only gsm8k] [--quick]

SmolLM2-135M-Instruct, or the causal language model in the folder --model, with LoRA. It is warmed up on a random
twentieth of the pool; each method selects as many rows for each target; the original model is fine-tuned on each
selection for the same number of steps, and measured by the loss of a target's held-out answers. Every score table and
every fine-tune is kept in a file, so that a killed run goes on when it is started again, and a long one can be run in
pieces: --seeds, --methods and --only take a part of it.
With --warm-up-seed all seeds select by the scores of one warm-up, which are most of the time.
With --tune-learning-rate the same selections are tuned on at another rate than the warm-up's, kept in their own folder.
Beside the rules of the package: random and balanced draws, length, loss, facility location, additive influence with and
without rows that read alike, LESS as in the paper and as in its code, RDS+, embeddings (of words: TF-IDF with latent
semantic analysis, offline), TRAK and TracIn. The last line is machine-readable.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from less_recipe_data import (
    TARGETS,
    TASKS,
    TOPICS,
    Texts,
    folder_texts,
    known_target,
    made_texts,
    recipe_data,
    template_texts,
)
from less_recipe_methods import FOR_ANY, METHODS, TABLES, Pool, rows_of
from less_recipe_report import Outcome, lines, result, table
from less_recipe_training import Recipe, Training
from llm_demo import silence
from pair_sets import texts as words_of
from smollm2 import load_smollm2
from study_model import folder_model, folder_tokenizer, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUICK = {
    "pool_rows": 64,
    "query_rows": 4,
    "held_out_rows": 4,
    "max_tokens": 96,
    "epochs": 2,
    "steps": 6,
    "landmarks": 16,
}
ANY = "any"
SETTINGS = "settings.json"


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The sizes that were asked for."""
    return Recipe(
        data="quick" if options.quick else "made" if options.data is None else "folder",
        targets=tuple(options.targets),
        pool_rows=options.pool_rows,
        query_rows=options.query_rows,
        held_out_rows=options.held_out_rows,
        max_tokens=options.max_tokens,
        budget=max(1, round(options.budget * options.pool_rows)),
        warm_up_rows=max(1, round(options.warm_up * options.pool_rows)),
        epochs=options.epochs,
        steps=options.steps,
        learning_rate=options.learning_rate,
        dimensions=256 if options.quick else 8192,
        trak_dimensions=48 if options.quick else 1024,
        curvature_rows=options.curvature_rows,
        model=options.model if options.model is None else options.model.resolve().name,
        dtype=options.dtype,
        warm_up_seed=options.warm_up_seed,
        landmarks=options.landmarks,
        device=options.device,
        scored_rows=options.scored_rows,
    )


def texts_for(recipe: Recipe, folder: Path | None) -> Texts:
    if recipe.data == "quick":
        return template_texts(recipe.targets)
    if folder is not None:
        return folder_texts(folder, recipe.targets)
    return made_texts(recipe.targets, recipe.pool_rows, recipe.query_rows, recipe.held_out_rows)


def prepared(recipe: Recipe, options: argparse.Namespace) -> Training:
    """The rows and the model."""
    texts = texts_for(recipe, options.data)
    load, tokenizer = language_model(recipe, options, texts)
    loaded = functools.cache(lambda: _attending(load(), recipe))  # a copy takes less time than the files
    sizes = recipe.pool_rows, recipe.query_rows, recipe.held_out_rows, recipe.max_tokens
    data = recipe_data(texts, tokenizer, *sizes)
    return Training(recipe, data, lambda: copy.deepcopy(loaded()), options.out)


def language_model(
    recipe: Recipe, options: argparse.Namespace, texts: Texts
) -> tuple[Callable[[], PreTrainedModel], PreTrainedTokenizerBase]:
    """What loads the original model, and its tokenizer."""
    dtype = getattr(torch, recipe.dtype)  # of the frozen weights: those of LoRA, and their gradients, are in float32
    if options.model is not None:
        tokenizer = folder_tokenizer(options.model)
        return (lambda: folder_model(options.model).to(dtype)), tokenizer
    if recipe.data == "quick":
        tokenizer = tiny_tokenizer(words_of(texts.all()))
        return (lambda: tiny_model(tokenizer, 0).to(dtype)), tokenizer
    _, tokenizer = load_smollm2(options.cache)
    return (lambda: load_smollm2(options.cache)[0].to(dtype)), tokenizer


def _attending(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """On a CPU in bfloat16, fused attention is about a third of a forward and backward pass; written out, far less."""
    if recipe.device == "cpu" and recipe.dtype == "bfloat16":
        model.set_attn_implementation("eager")
    return model


def check_same(recipe: Recipe, out: Path) -> None:
    """Pieces of one run share their settings.

    Raises:
        ValueError: If the folder holds those of another.
    """
    file, own = out / SETTINGS, json.loads(json.dumps(asdict(recipe)))
    if file.exists():
        kept = json.loads(file.read_text())
        odd = {name: (kept.get(name), value) for name, value in own.items() if kept.get(name) != value}
        if odd:
            raise ValueError(
                f"`--out {out}`: it holds a run with other settings, {odd} (there, now). Expected the same, or "
                "another folder."
            )


def write(file: Path, content: object) -> None:
    """The file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content) + "\n")
    unfinished.rename(file)


def fine_tunes(training: Training, options: argparse.Namespace) -> None:
    """Every fine-tune that is asked for and not there yet."""
    for seed in options.seeds:
        pool = Pool(training.out / f"seed={seed}", training.data, training.recipe, training, seed)
        for name in options.tables:
            pool.tables(name)
        for method in options.methods:
            for target in [ANY] if method in FOR_ANY else options.only:
                folder = pool.folder / _tunes(options.tune_learning_rate)
                file = folder / f"{_plain(method)}-{_plain(target)}.json"
                if not file.exists():
                    write(file, fine_tune(pool, method, target, options.tune_learning_rate))


def fine_tune(pool: Pool, method: str, target: str, rate: float | None = None) -> dict[str, object]:
    """Selects, trains and measures."""
    started = time.perf_counter()
    rows = rows_of(pool, method, target)
    chosen = time.perf_counter()
    measured = pool.recipe.targets if target == ANY else (target,)
    training = pool.training
    losses = training.losses(training.fine_tuned(rows, pool.seed, rate), measured)
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    ended = time.perf_counter()
    seconds = {"selection": round(chosen - started, 1), "training": round(ended - chosen, 1)}
    print(f"seed {pool.seed}, {method}: {shown} ({seconds['training']:.0f} s)", flush=True)
    names = [pool.data.pool.rows[place].id for place in rows]
    return {"method": method, "seed": pool.seed, "losses": losses, "rows": names, "seconds": seconds}


def untouched(training: Training) -> dict[str, float]:
    """Losses of the original model, measured once."""
    file = training.out / "untouched.json"
    if not file.exists():
        write(file, training.losses(training.original(0), training.recipe.targets))
    found: dict[str, float] = json.loads(file.read_text())
    return found


def outcomes(out: Path, rate: float | None = None) -> Iterator[Outcome]:
    """Of every fine-tune on disk, also of earlier pieces."""
    for file in sorted(out.glob(f"seed=*/{_tunes(rate)}/*.json")):
        found = json.loads(file.read_text())
        for target, loss in found["losses"].items():
            yield Outcome(target, found["method"], found["seed"], loss)


def _tunes(rate: float | None) -> str:
    """Folder of the fine-tunes at a rate, None for that of the warm-up."""
    return "fine-tunes" if rate is None else f"fine-tunes-{rate:g}"


def _plain(name: str) -> str:
    """For the name of a file."""
    return "".join(sign if sign.isalnum() else "_" for sign in name.replace("+", "plus"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("LI_DATA"), help="folder with alpaca, dolly, gsm8k and so on")
    add("--targets", nargs="+", help="gsm8k, mmlu/<subject> or bbh/<task>; without --data task families")
    add("--pool-rows", type=int, default=2400, help="rows to choose from")
    add("--query-rows", type=int, default=16, help="rows of each target to select by")
    add("--held-out-rows", type=int, default=64, help="rows of each target that measure the loss")
    add("--max-tokens", type=int, default=256, help="longer rows are left out")
    add("--budget", type=float, default=0.05, help="share of the pool that is selected")
    add("--warm-up", type=float, default=0.05, help="share of the pool for the warm-up")
    add("--epochs", type=int, default=4, help="of the warm-up, each with a checkpoint")
    add("--steps", type=int, default=60, help="optimizer steps on each selection, 4 rows each")
    add("--learning-rate", type=float, default=5e-4, help="of the warm-up, and of tuning unless it has its own")
    add("--tune-learning-rate", type=float, help="of tuning on the selections; scores stay those of the warm-up")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of warm-up, draws, LoRA weights and order")
    add("--warm-up-seed", type=int, help="all seeds read the scores of this one's warm-up; draws and tuning differ")
    add("--curvature-rows", type=int, help="rows of the pool that the curvature is fitted on; all without it")
    add("--landmarks", type=int, default=256, help="rows of the pool that newton knows the others by, beside queries")
    add("--model", type=Path, help="folder of a causal language model and its tokenizer, in place of SmolLM2")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen weights")
    add("--device", default="cpu", help="where models are trained and rows are scored, such as cuda")
    add("--scored-rows", type=int, default=8, help="of a batch that is scored; a GPU wants more")
    add("--tables", nargs="*", choices=tuple(TABLES), default=[], metavar="TABLE", help="scores to take before tuning")
    add("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--only", nargs="+", metavar="TARGET", help="fine-tune for these of the targets alone")
    add("--quick", action="store_true", help="a tiny model and rows from templates, one seed; ignores sizes")
    add("--out", type=Path, default=Path("runs/less_recipe"), help="folder for everything written")
    add("--cache", type=Path, default=Path("runs/models"), help="folder for the model's weights")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK, data=None, budget=0.1, warm_up=0.25, learning_rate=5e-3, seeds=options.seeds[:1])
    options.data = None if options.data is None else Path(options.data)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    known = TOPICS if options.quick else TASKS if options.data is None else TARGETS
    options.targets = list(dict.fromkeys(options.targets or known))
    options.only = options.targets if options.only is None else options.only
    sizes = (
        "pool_rows",
        "query_rows",
        "held_out_rows",
        "max_tokens",
        "epochs",
        "steps",
        "learning_rate",
        "scored_rows",
    )
    given = [getattr(options, name) for name in sizes]
    optional = "curvature_rows", "tune_learning_rate"
    given += [getattr(options, name) for name in optional if getattr(options, name) is not None]
    if min(given) <= 0 or min(*options.seeds, options.warm_up_seed or 0) < 0:
        named = ", ".join("--" + name.replace("_", "-") for name in (*sizes, *optional))
        parser.error(f"expected {named} > 0, --seeds and --warm-up-seed >= 0")
    if not 0 <= options.landmarks <= options.pool_rows:
        parser.error(f"expected --landmarks from 0 to the {options.pool_rows} rows of the pool")
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"expected --model to be a folder with config.json, {options.model} has none")
    if not all(0 < share <= 1 for share in (options.budget, options.warm_up)):
        parser.error("expected --budget and --warm-up as shares of the pool in (0, 1], such as 0.05")
    unknown = [name for name in options.targets if not (known_target(name) if options.data else name in known)]
    if unknown:
        which = "gsm8k, mmlu/<subject> or bbh/<task>" if options.data else f"some of {', '.join(known)}"
        parser.error(f"expected --targets {which}, got {', '.join(unknown)}")
    if not set(options.only) <= set(options.targets):
        parser.error(f"expected --only some of the targets {', '.join(options.targets)}")
    if not _present(options.device):
        parser.error(f"expected --device to be one that this machine has, such as cpu; got {options.device}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"expected --data to be a folder, {options.data} is none")


def _present(device: str) -> bool:
    try:
        return bool(torch.get_device_module(device).is_available())
    except RuntimeError:  # torch knows no such device
        return False


def main(arguments: Sequence[str]) -> None:
    options, started = parse(arguments), time.perf_counter()
    silence()
    for text in ("Checkpoint directory .* exists and is not empty", ".*tensorboardX"):
        warnings.filterwarnings("ignore", text)
    recipe = recipe_of(options)
    try:
        check_same(recipe, options.out)
        training = prepared(recipe, options)
        write(options.out / SETTINGS, asdict(recipe))
    except ValueError as error:
        sys.exit(f"less_recipe.py: {error}")
    print(training.data.describe(), flush=True)
    print(f"{recipe.budget} rows are selected, {recipe.warm_up_rows} are for the warm-up", flush=True)
    before = untouched(training)
    fine_tunes(training, options)
    found = lines(list(outcomes(options.out, options.tune_learning_rate)))
    print(table(found, before))
    print(f"\n{time.perf_counter() - started:.0f} s; everything is in {options.out}")
    settings = {**asdict(recipe), "tune_learning_rate": options.tune_learning_rate or recipe.learning_rate}
    print("RESULT", json.dumps({**result(found, before), "settings": settings}))


if __name__ == "__main__":
    main(sys.argv[1:])
