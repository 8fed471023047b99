"""The methods of `less_recipe.py`: what each scores a pool by, and which rows it takes.

Scores of one seed are taken once for all targets and kept in files, so that a killed run goes on.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from less_recipe_data import RecipeData
from less_recipe_training import Recipe, Training
from pair_sets import texts
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_influence import (
    EKFAC,
    TRAK,
    BalancedRandom,
    EmbeddingSimilarity,
    FacilityLocation,
    FactoredProjection,
    GradientDotRecorder,
    InfluenceFunction,
    InteractionGreedy,
    Interactions,
    LanguageModelLoss,
    LengthScore,
    LESSRecorder,
    LossScore,
    Newton,
    NewtonPool,
    Random,
    RedundancyFilter,
    RepresentationSimilarity,
    Scores,
    Selection,
    SelectionRule,
    TopK,
    TracIn,
    less_scores,
    score_features,
    select_by_scores,
    unseen_squares,
)
from lightning_influence.callbacks import Recorder
from lightning_influence.selection.pipeline import choose

LORA = "lora"


@dataclass(frozen=True)
class Pool:
    """Scores of the pool for all targets at one seed; a table is computed when it is first asked for.

    Attributes:
        folder: For files of this seed.
        data: Pool and targets.
        recipe: Sizes.
        training: Models.
        seed: Of draws, and of the warm-up unless the recipe has one for all seeds.
    """

    folder: Path
    data: RecipeData
    recipe: Recipe
    training: Training
    seed: int

    def table(self, name: str) -> Scores:
        """Scores [q, n]; ids are places."""
        values = self.tables(name)["scores"]
        return Scores(values, tuple(range(len(values))), tuple(range(values.shape[1])), name, "see the method")

    @cached_property
    def warmed(self) -> Pool:
        """The one whose warm-up the scores are of."""
        seed = self.recipe.warm_up_seed
        return self if seed is None else replace(self, folder=self.training.out / f"seed={seed}", seed=seed)

    def tables(self, name: str) -> dict[str, Tensor]:
        """From the file; it appears whole or not at all."""
        file = self.warmed.folder / "scores" / f"{name}.safetensors"
        if not file.exists():
            found = TABLES[name](self.warmed)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.tmp")
            save_file({key: value.contiguous() for key, value in found.items()}, unfinished)
            unfinished.rename(file)
            print(f"seed {self.warmed.seed}: scores by {name}", flush=True)
        return load_file(file)

    def of(self, name: str, target: str) -> Scores:
        """The rows of one target."""
        scores, members = self.table(name), self.data.members(target)
        return replace(scores, values=scores.values[members], query_ids=tuple(members))

    def interactions(self, target: str) -> Interactions:
        return Interactions.from_scores(self.of("influence", target))

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Latent semantic analysis: TF-IDF of the words, its leading singular vectors; of the pool and the queries."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        pool, asked = texts(self.data.pool.rows), texts(self.data.queries.rows)
        words = TfidfVectorizer(sublinear_tf=True)
        counts = words.fit_transform(pool)
        size = min(128, counts.shape[0] - 1, counts.shape[1] - 1)
        reduced = TruncatedSVD(size, random_state=0).fit(counts)
        both = (torch.from_numpy(reduced.transform(part)) for part in (counts, words.transform(asked)))
        one, other = both
        return one, other

    def parts(self) -> tuple[object, object]:
        """Loaders of queries and pool."""
        return self.scored(self.data.queries), self.scored(self.data.pool)

    def scored(self, rows: Any) -> DataLoader[Any]:
        """Batches for scoring."""
        return self.data.loader(rows, self.recipe.scored_rows)


# -- scores [q, n]


def _influence(pool: Pool) -> dict[str, Tensor]:
    """Unit gradients whitened by EK-FAC, at the warm-up model: products of queries and pool, and squared lengths.

    ``marks`` [l, n] are those of some rows of the pool, at ``places`` [l], with the pool.
    """
    queries, rows = pool.parts()
    drawn = torch.randperm(len(pool.data.pool), generator=torch.Generator().manual_seed(pool.seed)).tolist()
    part, places = sorted(drawn[: pool.recipe.curvature_rows]), sorted(drawn[: pool.recipe.landmarks])
    estimator = InfluenceFunction(
        pool.training.warm(pool.seed), EKFAC(seed=pool.seed), components=LORA, normalise=True, progress=False
    ).fit(pool.scored(Subset(pool.data.pool, part)))
    asked: Any = ConcatDataset([pool.data.queries, Subset(pool.data.pool, places)])
    scores, squares = (found.total() for found in estimator.score_with_self(pool.scored(asked), rows))
    own = estimator.score(queries, queries).total()
    q = len(own)
    return {
        "scores": scores[:q],
        "own": own,
        "squares": squares[0],
        "marks": scores[q:],
        "places": torch.tensor(places, dtype=torch.int64),
    }


def _recorded(
    make: Callable[[Pool, Path], Recorder], total: Callable[[Recorder], Scores]
) -> Callable[[Pool], dict[str, Tensor]]:
    """Scores summed over the checkpoints of the warm-up, which is run again with a recorder."""

    def table(pool: Pool) -> dict[str, Tensor]:
        recorder = make(pool, pool.folder / "recordings")
        folder = pool.folder / "recordings" / recorder.name
        pool.training.warm_up(pool.seed, recorder, folder)
        found = total(recorder).total().double()
        shutil.rmtree(folder)
        return {"scores": found}

    return table


def _less(variant: str) -> Callable[[Pool, Path], Recorder]:
    def make(pool: Pool, folder: Path) -> Recorder:
        queries, rows = pool.parts()
        return LESSRecorder(
            queries,
            train=rows,
            projection=FactoredProjection(pool.recipe.dimensions),
            variant=variant,  # type: ignore[arg-type]
            components=LORA,
            when="checkpoint",
            dirpath=str(folder),
            name=variant,
        )

    return make


def _dots(pool: Pool, folder: Path) -> Recorder:
    queries, rows = pool.parts()
    options = {"components": LORA, "when": "checkpoint", "dirpath": str(folder), "name": "tracin"}
    return GradientDotRecorder(queries, train=rows, loss=LanguageModelLoss("mean"), **options)


def _trak(pool: Pool) -> dict[str, Tensor]:
    queries, rows = pool.parts()
    projection = FactoredProjection(pool.recipe.trak_dimensions)
    options = {"components": LORA, "damping_share": 0.01, "progress": False}
    found = TRAK(pool.training.warm(pool.seed), projection, **options).fit(rows).score(queries)
    return {"scores": found.total()}


def _rds(pool: Pool) -> dict[str, Tensor]:
    model = pool.training.original(pool.seed)
    similarity = RepresentationSimilarity(model, pooling="weighted", progress=False)
    return {"scores": similarity.score(*pool.parts()).total()}


def _embeddings(pool: Pool) -> dict[str, Tensor]:
    train, asked = pool.vectors
    found = EmbeddingSimilarity(train_vectors=train, query_vectors=asked, progress=False)
    return {"scores": found.score(pool.data.queries, pool.data.pool).total()}


def _loss(pool: Pool) -> dict[str, Tensor]:
    model, rows = pool.training.original(pool.seed), pool.data.loader(pool.data.pool)
    return {"scores": LossScore(model, LanguageModelLoss("mean"), progress=False).score(None, rows).total()}


def _length(pool: Pool) -> dict[str, Tensor]:
    model, rows = pool.training.original(pool.seed), pool.data.loader(pool.data.pool)
    return {"scores": LengthScore(model, loss=LanguageModelLoss("mean"), progress=False).score(None, rows).total()}


TABLES: dict[str, Callable[[Pool], dict[str, Tensor]]] = {
    "influence": _influence,
    "less": _recorded(_less("less"), lambda recorder: less_scores(recorder.records)),
    "less_repo": _recorded(_less("less_repo"), lambda recorder: less_scores(recorder.records)),
    "tracin": _recorded(_dots, lambda recorder: TracIn.from_records(recorder.records).scores()),
    "trak": _trak,
    "rds": _rds,
    "embeddings": _embeddings,
    "loss": _loss,
    "length": _length,
}


# -- selections


def _newton(pool: Pool, target: str, budget: int) -> Selection:
    """Rows are known by what the queries of all targets and the landmarks see of them.

    The training is short, so that what a few rows are predicted to do must not use up the estimate. The same as
    ``rule=Newton("saturate")`` of a `DataSelector`, where rows are known by the queries of its own target alone.
    """
    tables = pool.tables("influence")
    scores, places = torch.cat([tables["scores"], tables["marks"]]), tables["places"]
    q = len(tables["own"])
    own = torch.cat([torch.cat([tables["own"], scores[:q, places]], dim=1), scores[:, places].T])
    rows, goals = score_features(scores, own)
    unseen = unseen_squares(rows, tables["squares"])
    known = NewtonPool(rows, goals[pool.data.members(target)], unseen=unseen)
    return known.select(budget, Newton("saturate"))


def _by_interactions(rule: SelectionRule) -> Callable[[Pool, str, int], Selection]:
    return lambda pool, target, budget: choose(pool.interactions(target), rule, budget)


def _by_scores(name: str, across: str = "mean") -> Callable[[Pool, str, int], Selection]:
    """The rows of the largest mean over the target's queries, or the queries take turns."""
    options = {"across": across}
    return lambda pool, target, budget: select_by_scores(pool.of(name, target), budget=budget, **options)


def _different(pool: Pool, target: str, budget: int) -> Selection:
    """Additive influence without rows that read alike."""
    values = pool.of("influence", target).values.mean(0)
    return RedundancyFilter(0.9, pool.vectors[0]).select(values, budget=budget)


def _drawn(rule: Callable[[Pool], SelectionRule]) -> Callable[[Pool, int], Selection]:
    return lambda pool, budget: rule(pool).select(torch.zeros(len(pool.data.pool)), budget=budget)


FOR_ANY: dict[str, Callable[[Pool, int], Selection]] = {  # they know of no target: one selection serves all
    "random": _drawn(lambda pool: Random(pool.seed)),
    "random balanced": _drawn(lambda pool: BalancedRandom(pool.data.sources, pool.seed)),
    "length": lambda pool, budget: select_by_scores(pool.table("length"), budget=budget),
    "loss": lambda pool, budget: select_by_scores(pool.table("loss"), budget=budget),
    "facility location": _drawn(lambda pool: FacilityLocation(pool.vectors[0])),
}
FOR_ONE: dict[str, Callable[[Pool, str, int], Selection]] = {
    "interactions": _by_interactions(InteractionGreedy()),
    "newton": _newton,
    "additive": _by_interactions(TopK()),
    "additive, different": _different,
    "LESS": _by_scores("less"),
    "LESS, repo": _by_scores("less_repo"),
    "RDS+": _by_scores("rds", "round-robin"),
    "embeddings": _by_scores("embeddings", "round-robin"),
    "TRAK": _by_scores("trak"),
    "TracIn": _by_scores("tracin"),
}
METHODS = (*FOR_ANY, *FOR_ONE)


def rows_of(pool: Pool, method: str, target: str) -> Sequence[int]:
    """Places of the rows that a method takes, in pick order; the target plays no part in some of them."""
    budget = pool.recipe.budget
    found = FOR_ANY[method](pool, budget) if method in FOR_ANY else FOR_ONE[method](pool, target, budget)
    assert all(map(math.isfinite, found.gains.tolist()))
    return found.positions
