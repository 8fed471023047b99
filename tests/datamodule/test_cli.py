"""Everything can be written in the file of a LightningCLI."""

from __future__ import annotations

import pytest
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_influence.callbacks.records import find_records
from lightning_influence.curvature import EKFAC
from lightning_influence.estimators import ComponentDots
from lightning_influence.selection import Newton, TopK
from lightning_influence.store import Store

CONFIG = """\
seed_everything: 1
trainer:
  max_epochs: 1
  reload_dataloaders_every_n_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
  - class_path: lightning_influence.callbacks.curvature_recorder.CurvatureRecorder
    init_args:
      curvature:
        class_path: lightning_influence.curvature.EKFAC
        init_args: {{damping: 0.1}}
      components: [net]
      loss:
        class_path: lightning_influence.capture.ClassificationLoss
  - class_path: lightning_influence.callbacks.gradient_dot_recorder.GradientDotRecorder
    init_args:
      queries:
        class_path: tests.datamodule.toys.Rows
        init_args: {{n: 3}}
      candidates: [[0, 1], [2, 3], [4, 5]]
      memory_budget: 1000000
      batch_positions: 64
      when: fit_end
model:
  class_path: tests.datamodule.toys.Net
data:
  class_path: lightning_influence.datamodule.DataSelector
  init_args:
    data:
      class_path: tests.datamodule.toys.Data
      init_args: {{n: 20}}
    budget: 0.25
    rule:
      class_path: lightning_influence.selection.TopK
    curvature:
      class_path: lightning_influence.curvature.EKFAC
    weight: 1/k
    budget:
      class_path: lightning_influence.TokenBudget
      init_args: {{tokens: 9}}
    constraints:
      sources: [a, b, a]
      max_per_source: {{a: 1}}
      must_include: [2]
    leaks: refuse
    target_weights: {{law: -1}}
    across: mean
    warmup: 0.5
    reselect_every_n_epochs: 2
    weights: gains
    seed: 3
    selection: [1, 2]
"""


NEWTON = """\
    rule:
      class_path: lightning_influence.Newton
      init_args: {{ridge: saturate, landmarks: 0.5}}
"""
HELD_OUT = """\
    rule:
      class_path: lightning_influence.Newton
      init_args: {{ridge: held-out, folds: 3}}
"""
TOP = """\
    rule:
      class_path: lightning_influence.selection.TopK
"""


def from_file(folder, monkeypatch, config, command):
    (folder / "config.yaml").write_text(config.format(folder=folder))
    monkeypatch.setattr("sys.argv", ["train.py"])  # Lightning warns when pytest has arguments of its own
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=[*command, "--config", str(folder / "config.yaml")],
        save_config_callback=None,
        run=bool(command),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (NEWTON, Newton("saturate", 0.5)),
        (HELD_OUT, Newton("held-out", folds=3)),
        ("    rule: {{ridge: 0.3, screen: false}}\n", Newton(0.3, screen=False)),
        ("    rule: newton\n", "newton"),
    ],
)
def test_the_newton_step_from_a_file(rule, expected, tmp_path, monkeypatch):
    config = CONFIG.replace(TOP, rule).replace("    weight: 1/k\n", "")
    assert from_file(tmp_path, monkeypatch, config, []).datamodule._options["rule"] == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_weight_by_held_out_targets_from_a_file(tmp_path, monkeypatch):
    config = CONFIG.replace(TOP, "").replace("    weight: 1/k\n", "    weight: held-out\n    folds: 4\n")
    options = from_file(tmp_path, monkeypatch, config, []).datamodule._options
    assert (options["rule"], options["weight"], options["folds"]) == (None, "held-out", 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own calls into jsonargparse
def test_callbacks_and_datamodule_from_a_file(tmp_path, monkeypatch):
    cli = from_file(tmp_path, monkeypatch, CONFIG, ["fit"])
    selector = cli.datamodule
    assert selector.n == 20
    assert dict(selector._inner.hparams) == dict(selector._inner.hparams_initial)  # its own, not the selector's
    assert (selector._inner.hparams.n, "warmup" in selector._inner.hparams) == (20, False)
    assert (selector.hparams.warmup, selector.hparams_initial.warmup) == (0.5, 0.5)  # the section as it was given
    assert selector.selected_ids == [1, 2]
    assert len(cli.model.seen) == 2
    assert (selector._warmup.part, selector._reselection.every, selector._weights, selector._seed) == (
        0.5,
        2,
        "gains",
        3,
    )
    assert isinstance(selector._options["rule"], TopK)
    assert isinstance(selector._options["curvature"], EKFAC)
    limits = selector._options["constraints"]
    assert (limits.max_per_source, limits.must_include) == ({"a": 1}, (2,))
    assert selector._budget.tokens == 9
    [curvature] = find_records(next(tmp_path.rglob("curvature")))
    assert Store.open(curvature.path).read_curvature("curvature").settings()["damping"] == 0.1
    [dots] = find_records(next(tmp_path.rglob("gradient_dot")))
    assert ComponentDots.load(Store.open(dots.path)).candidates() == [[0, 1], [2, 3], [4, 5]]
