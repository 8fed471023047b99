"""Parity with kronfluence 1.0.1, the library for EK-FAC influence: the same model, labels and damping.

Its conventions are those of [MS]: covariances over positions, Lambda over examples, damping 0.1 x mean(Lambda) of
a component (``damping_factor=None``), summed losses. Grouped convolutions and other padding than zeros are left out:
it computes something else there.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

from lightning_influence import EKFAC, KFAC, Identity, InfluenceFunction
from tests.curvature.models import Images, images, labels, mlp, normal, ready, texts


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    train: list[Any]
    queries: list[Any]
    layers: tuple[str, ...]

    def model(self, dtype: torch.dtype) -> nn.Module:
        return ready(self.build()).to(dtype)

    def rows(self, rows: list[Any], dtype: torch.dtype) -> list[Any]:
        return rows if isinstance(rows[0], dict) else [(x.to(dtype), y) for x, y in rows]


def classifier() -> nn.Module:
    return mlp(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def neox() -> nn.Module:
    sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=12, max_position_embeddings=16, use_cache=False))


def flat_points(n: int, seed: int) -> list[Any]:
    return list(zip(normal(n, 6, seed=seed), labels(n, 4, seed), strict=True))


def padded(n: int, seed: int) -> list[Any]:
    """Nothing is predicted from padding: there kronfluence counts output gradients, and inputs not; we neither."""
    rows = texts(n, 9, seed)
    for row in rows:
        row["labels"][row["attention_mask"].argmax()] = -100
    return rows


BLOCKS = [f"gpt_neox.layers.{k}.{name}" for k in (0, 1) for name in ("attention.query_key_value", "attention.dense")]
BLOCKS += [f"gpt_neox.layers.{k}.mlp.{name}" for k in (0, 1) for name in ("dense_h_to_4h", "dense_4h_to_h")]
CASES = {
    "mlp": Case(classifier, flat_points(30, 0), flat_points(5, 1), ("0", "2", "4")),
    "padded text": Case(neox, padded(14, 0), padded(5, 1), tuple(BLOCKS)),
    "convolutions": Case(Images, images(20), images(5, seed=1), ("first", "second", "head")),
}


@pytest.fixture(autouse=True)
def _little_garbage() -> Iterator[None]:
    """It collects garbage after every step, for which everything that is imported would be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


class SameLosses(Task):
    """Sums of the per-example losses, as ours."""

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        assert not sample, "empirical Fisher: the labels of the data"
        if isinstance(batch, dict):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return list(self.layers)

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        return batch["attention_mask"] if isinstance(batch, dict) else None


def theirs(case: Case, strategy: str, dtype: torch.dtype, damping: float | None, folder: Path) -> Tensor:
    task = SameLosses(case.layers)
    model = prepare_model(copy.deepcopy(case.model(dtype)), task)
    covariance = {"activation_covariance_dtype": dtype, "gradient_covariance_dtype": dtype}
    rest = {"per_sample_gradient_dtype": dtype, "lambda_dtype": dtype, "use_empirical_fisher": True}
    factors = FactorArguments(strategy=strategy, **covariance, **rest)
    kinds = {"per_sample_gradient_dtype": dtype, "precondition_dtype": dtype, "score_dtype": dtype}
    scores = ScoreArguments(damping_factor=damping, **kinds)
    train, queries = case.rows(case.train, dtype), case.rows(case.queries, dtype)
    quiet = {"cpu": True, "disable_tqdm": True, "log_level": logging.ERROR}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer = Analyzer("parity", model, task, output_dir=str(folder), **quiet)
        analyzer.fit_all_factors("f", train, per_device_batch_size=4, factor_args=factors)
        sizes = {"per_device_query_batch_size": 5, "per_device_train_batch_size": 4}
        analyzer.compute_pairwise_scores("s", "f", queries, train, score_args=scores, **sizes)
        return analyzer.load_pairwise_scores("s")["all_modules"]


def ours(case: Case, curvature: Any, dtype: torch.dtype) -> Tensor:
    influence = InfluenceFunction(case.model(dtype), curvature, components=list(case.layers), batch_size=3)
    train = case.rows(case.train, dtype)
    return influence.fit(train).score(case.rows(case.queries, dtype), train).values


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest score of the query."""
    return float(((found - expected).abs().amax(1) / expected.abs().amax(1)).max())


def spearman(found: Tensor, expected: Tensor) -> float:
    """Lowest rank correlation over the queries."""
    ranks = [scores.argsort(1).argsort(1).double() for scores in (found, expected)]
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_ekfac_in_float64(name: str, damping: float | None, tmp_path: Path) -> None:
    expected = theirs(CASES[name], "ekfac", torch.float64, damping, tmp_path)
    found = ours(CASES[name], EKFAC(damping=damping, fisher="empirical"), torch.float64)
    assert worst(found, expected) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_ekfac_in_float32(name: str, tmp_path: Path) -> None:
    expected = theirs(CASES[name], "ekfac", torch.float32, None, tmp_path)
    found = ours(CASES[name], EKFAC(fisher="empirical"), torch.float32)
    assert found.dtype == expected.dtype == torch.float32
    assert worst(found, expected) < 1e-4
    assert spearman(found, expected) >= 0.9999


@pytest.mark.parametrize("name", CASES)
def test_dot_products(name: str, tmp_path: Path) -> None:
    expected = theirs(CASES[name], "identity", torch.float64, None, tmp_path)
    assert worst(ours(CASES[name], Identity(), torch.float64), expected) < 1e-10


def test_kfac_for_one_position(tmp_path: Path) -> None:
    """With more positions it leaves their number out of S ⊗ A; see `KFAC`."""
    expected = theirs(CASES["mlp"], "kfac", torch.float64, None, tmp_path)
    assert worst(ours(CASES["mlp"], KFAC(fisher="empirical"), torch.float64), expected) < 1e-8
