"""`leave_group_out.py` in its quick form, and its own formulas against slow ones."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))  # as for a script that runs there

import group_estimates
import group_pairs
import leave_group_out as example
from group_pairs import DECAY, Pair, Training, found_pairs, load_pair

ROOT = Path(__file__).resolve().parent.parent
ALL = {*group_estimates.METHODS, "TracIn", "TRAK", "gradient dot"}


def pair(name="made-mlp", n=12, m=7, outputs=3):
    generator = torch.Generator().manual_seed(0)
    inputs, target_inputs = torch.randn(n, 4, generator=generator), torch.randn(m, 4, generator=generator)
    if outputs == 1:
        return Pair(name, inputs, inputs.sum(1, keepdim=True), target_inputs, target_inputs.sum(1, keepdim=True), 1)
    return Pair(name, inputs, torch.arange(n) % outputs, target_inputs, torch.arange(m) % outputs, outputs)


def ran(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "leave_group_out.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_quick_run(tmp_path):
    printed = ran("--quick", "--out", str(tmp_path))
    lines = json.loads(printed.splitlines()[-1].removeprefix("RESULT "))
    names = ("digits-logistic", "digits-mlp")
    assert {(row["pair"], row["size"]) for row in lines} == {(name, size) for name in names for size in (8, 24, 60)}
    for row in lines:
        assert row["method"] in ALL
        assert -1 <= row["spearman_low"] <= row["spearman"] <= row["spearman_high"] <= 1
        assert row["cases"] == 10
    exact = {(row["size"], row["method"]): row["spearman"] for row in lines if row["pair"] == "digits-logistic"}
    assert min(exact[8, method] for method in group_estimates.METHODS) > 0.95
    for size in (24, 60):
        assert exact[size, "N+I"] > 0.95 > exact[size, "F"]
    assert "not as claimed:\n  digits-logistic, groups of 8: F+I <= F" in printed
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["spearman"] for row in kept] == [row["spearman"] for row in lines]
    for name in names:
        trainings = (tmp_path / f"{name}-0.jsonl").read_text().splitlines()
        assert len(trainings) <= 1 + 31
        assert json.loads(trainings[0])["settings"]["pair"] == name


@pytest.mark.parametrize("outputs", [1, 3])
def test_gradients_and_the_fisher_solve(outputs):
    made = pair(outputs=outputs)
    model = made.network(0)
    effects = group_estimates.network_effects(made, model)
    rows = effects.curvature_rows.flatten(0, 1)
    gradients = []
    for x, y in zip(made.inputs, made.labels, strict=True):
        loss = made.loss(model(x[None]), y[None])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    for shifts, vectors in ((effects.shifts, torch.stack(gradients).double()), (effects.curvature_shifts[:, 0], None)):
        wanted = effects.curvature_rows[:, 0] if vectors is None else vectors
        product = (shifts @ rows.mT) @ rows / 12 + DECAY * shifts  # (G + λ) u
        torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-5)
    loss = made.loss(model(made.target_inputs), made.target_labels)
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(effects.target_gradient, mean.double(), rtol=1e-4, atol=1e-6)
    if outputs == 1:  # the Gauss-Newton matrix is the second derivative where the output is linear: the last bias
        assert rows[:, -1].square().mean().item() == pytest.approx(1)


def test_the_newton_step_is_always_defined_with_the_fisher_of_the_groups_own_gradients():
    effects = group_estimates.network_effects(made := pair(n=30), made.network(0))
    found = group_estimates.estimates(effects, {}, [tuple(range(29)), (3,), tuple(range(10))])
    assert set(found) == set(group_estimates.METHODS)


def test_logistic_regression_is_exact():
    made = pair("made-logistic", n=20)
    model = Training(made, 1, 0.1).exact(tuple(range(20)))
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def objective(weight, bias):
        loss = F.cross_entropy(made.inputs.double() @ weight.mT + bias, made.labels)
        return loss + 0.5 * DECAY * (weight.square().sum() + bias.square().sum())

    slopes = torch.autograd.grad(objective(*weights), weights)
    assert max(slope.abs().max().item() for slope in slopes) < 1e-7
    blocks = torch.autograd.functional.hessian(objective, tuple(weights))
    hessian = torch.zeros(3, 5, 3, 5).double()  # [W | b], class by class
    hessian[:, :4, :, :4], hessian[:, :4, :, 4] = blocks[0][0], blocks[0][1]
    hessian[:, 4, :, :4], hessian[:, 4, :, 4] = blocks[1][0], blocks[1][1]
    effects = group_estimates.dense_effects(made, model)
    p = group_estimates.probabilities(model, made.inputs)
    ones = torch.ones(20, 1).double()
    residuals = p - F.one_hot(made.labels, 3)
    gradients = torch.einsum("no,ni->noi", residuals, torch.cat([made.inputs.double(), ones], 1)).flatten(1)
    torch.testing.assert_close(effects.shifts @ hessian.reshape(15, 15), gradients)


def test_newton_with_interactions_is_nearest_to_retraining_where_groups_are_small():
    made = pair("made-logistic", n=40, m=30)
    training = Training(made, 1, 0.1)
    model = training.exact(tuple(range(40)))
    base, groups = made.target_loss(model), [(k, k + 1, k + 2) for k in range(0, 36, 3)]
    real = torch.tensor(
        [training(tuple(k for k in range(40) if k not in group), 0) - base for group in groups]
    ).double()
    found = group_estimates.estimates(group_estimates.dense_effects(made, model), {}, groups)
    errors = {method: (values - real).abs().mean().item() for method, values in found.items()}
    assert errors["N+I"] == min(errors.values())
    assert errors["N+I"] < 0.5 * errors["F"]


def small_regression():
    made = pair(n=60, m=30, outputs=1)
    return replace(made, decay=0.05, smooth=True, labels=made.inputs[:, :1].sin())


def test_a_smooth_network_is_trained_to_its_minimum_and_on_from_there():
    made = small_regression()
    training, everyone = Training(made, 1, 0.1), tuple(range(60))
    network = training.network(everyone, 0)
    rest = training.network(everyone[3:], 0)
    for model, rows in ((network, 0), (rest, 3)):
        inputs, labels, weight = made.inputs[rows:].double(), made.labels[rows:], (60 - rows) / 60
        squares = sum(p.square().sum() for p in model.parameters())
        objective = weight * made.loss(model(inputs), labels) + 0.5 * 0.05 * squares  # 1/n for every row
        slopes = torch.autograd.grad(objective, list(model.parameters()))
        assert max(slope.abs().max().item() for slope in slopes) < 1e-6
    moved = sum((a - b).square().sum() for a, b in zip(network.parameters(), rest.parameters(), strict=True))
    other = training.network(everyone, 1)
    apart = sum((a - b).square().sum() for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert 0 < moved < 0.1 * apart


def test_estimates_by_the_hessian_foretell_retraining_of_a_smooth_network():
    made = small_regression()
    training, everyone = Training(made, 1, 0.1), tuple(range(60))
    base, groups = training(everyone, 0), [(k, k + 1) for k in range(0, 24, 2)]
    real = torch.tensor([training(tuple(set(everyone) - set(group)), 0) - base for group in groups]).double()
    effects = group_estimates.hessian_effects(made, training.network(everyone, 0))
    found = group_estimates.estimates(effects, {}, groups)
    assert (found["F+I+B"] - real).norm() < 0.3 * real.norm()
    assert (found["F+I+B"] - real).norm() < (found["F"] - real).norm()


def test_sgd_follows_the_seed_and_keeps_checkpoints():
    made = pair()
    training = Training(made, 4, 0.1)
    path = training.sgd(tuple(range(12)), 3, checkpoints=2)
    assert len(path) == 2
    again = training.sgd(tuple(range(12)), 3)[-1]
    for a, b in zip(path[-1].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert training((0, 1, 2), 0) != training((0, 1, 2), 1)
    assert Training(made, 200, 0.1)(tuple(range(12)), 0) != training(tuple(range(12)), 0)


def data(folder):
    """Small files in the layout of the real ones."""
    images, labels = np.arange(60 * 784, dtype=np.uint64) % 251, np.arange(60) % 10
    for name in ("mnist", "fashion_mnist"):
        (folder / name).mkdir()
        for kind, head, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            with gzip.open(folder / name / f"train-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(head) + values.astype(np.uint8).tobytes())
    table = np.random.default_rng(0).normal(size=(90, 9))
    (folder / "uci_regression" / "concrete").mkdir(parents=True)
    np.savetxt(folder / "uci_regression" / "concrete" / "data.txt", table)
    head = "subject#,age,motor_UPDRS,total_UPDRS,jitter\n"
    lines = [f"{k},{a},{b},{c},{d}\n" for k, (a, b, c, d) in enumerate(table[:, :4])]
    (folder / "uci_regression" / "parkinsons_updrs.csv").write_text(head + "".join(lines))
    (folder / "cifar-10-batches-bin").mkdir()
    for part in (1, 2):
        pixels = np.random.default_rng(part).integers(0, 256, (15, 3073))
        pixels[:, 0] = np.arange(15) % 10
        (folder / "cifar-10-batches-bin" / f"data_batch_{part}.bin").write_bytes(pixels.astype(np.uint8).tobytes())
    return folder


def test_data_sets_are_read(tmp_path):
    folder = data(tmp_path)
    assert tuple(found_pairs(folder)) == group_pairs.PAIRS
    images = load_pair("mnist-mlp", folder, 30, 20, 28, 0)
    assert (images.inputs.shape, images.target_inputs.shape, images.outputs) == ((30, 784), (20, 784), 10)
    first = torch.randperm(60, generator=torch.Generator().manual_seed(0))[0].item()
    expected = torch.arange(first * 784, (first + 1) * 784) % 251 / 255
    torch.testing.assert_close(images.inputs[0], expected)
    assert images.labels[0] == first % 10
    small = load_pair("fashion_mnist-mlp", folder, 30, 20, 14, 0)
    assert small.inputs[0, 0].item() == pytest.approx(expected.reshape(28, 28)[:2, :2].mean().item(), abs=1e-6)
    for name, width in (("concrete-mlp", 8), ("parkinsons-mlp", 2)):
        table = load_pair(name, folder, 1000, 20, 14, 0)
        assert table.inputs.shape == (60, width)
        assert table.target_labels.shape == (20, 1)
        assert (table.outputs, table.labels.mean().item()) == (1, pytest.approx(0, abs=1e-6))
        assert table.labels.std().item() == pytest.approx(1, abs=1e-5)


def test_cifar10_is_read_from_its_binary_version(tmp_path):
    folder = data(tmp_path)
    made = load_pair("cifar10-resnet9", folder, 20, 10, 14, 0, width=4)
    assert (made.inputs.shape, made.target_inputs.shape, made.outputs) == ((20, 3, 32, 32), (10, 3, 32, 32), 10)
    parts = [folder / "cifar-10-batches-bin" / f"data_batch_{part}.bin" for part in (1, 2)]
    published = np.stack([np.frombuffer(part.read_bytes(), np.uint8).reshape(15, 3073) for part in parts]).reshape(
        30, -1
    )
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).numpy()
    assert made.labels.tolist() == published[order[:20], 0].tolist()
    assert made.target_labels.tolist() == published[order[20:], 0].tolist()
    red, blue = published[order[:20], 1:1025].astype(float), published[order[:20], 2049:].astype(float)
    for channel, values in ((0, red), (2, blue)):
        wanted = (values - values.mean()) / values.std(ddof=1)
        assert np.allclose(made.inputs[:, channel].flatten(1), wanted, atol=1e-3)
    parts[0].write_bytes(b"123")
    with pytest.raises(SystemExit, match=r"expected data_batch_.* 3073 bytes for each image"):
        load_pair("cifar10-resnet9", folder, 20, 10, 14, 0)


def test_resnet9_has_a_loss_of_each_example_and_a_rate_that_falls_to_0():
    made = load_pair("digits-resnet9", None, 20, 10, 14, 0, width=4)
    assert made.inputs.shape == (20, 1, 8, 8)
    network = made.network(3).train()
    assert sum(isinstance(part, nn.Conv2d) for part in network.modules()) == 8
    torch.testing.assert_close(network(made.inputs)[7:8], network(made.inputs[7:8]))
    assert group_pairs.resnet9(3, 10, 64)[-1].in_features == 512
    training = Training(made, 10, 0.1)
    rates = [training.rate_of(epoch) for epoch in range(1, 11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (0.1, pytest.approx(0.1 * np.sin(np.pi / 20) ** 2))
    assert training.mean_rates(5) == pytest.approx([np.mean(rates[k : k + 2]) for k in range(0, 10, 2)])
    assert Training(replace(made, name="digits-mlp"), 2, 0.3).mean_rates(5) == [0.3, 0.3]


def test_resnet9_is_trained_on_a_device():
    made = load_pair("digits-resnet9", None, 20, 10, 14, 0, width=4)
    networks = Training(made, 2, 0.1, "meta").sgd(tuple(range(20)), 0, checkpoints=2)
    assert [next(network.parameters()).device.type for network in networks] == ["meta", "meta"]


def test_resnet9_goes_on_without_a_group_in_the_same_batches():
    made, ids = load_pair("digits-resnet9", None, 130, 10, 14, 0, width=2), tuple(range(3, 130))
    training = Training(made, 2, 0.05, further=3)
    start = training.sgd(tuple(range(130)), 4)[-1]
    went = training.network(ids, 4)
    model, batches = start, torch.Generator().manual_seed(4)  # by hand: gradients of sums over the rows that are left
    momenta = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for rate in (0.05, 0.0375, 0.0125):
        for batch in torch.randperm(130, generator=batches).split(64):
            left = batch[batch >= 3]
            loss = F.cross_entropy(model(made.inputs[left]), made.labels[left], reduction="sum") / len(batch)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, gradient, momentum in zip(model.parameters(), gradients, momenta, strict=True):
                momentum.mul_(0.9).add_(gradient + DECAY * parameter.detach())
                parameter.data -= rate * momentum
    for one, other in zip(went.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    everyone = training.network(tuple(range(130)), 4)
    assert any(not torch.equal(a, b) for a, b in zip(everyone.parameters(), went.parameters(), strict=True))
    assert training.damping == pytest.approx(DECAY + 0.1 / (3 * (0.05 + 0.0375 + 0.0125)))
    assert Training(made, 2, 0.05).damping == DECAY


@pytest.mark.filterwarnings("ignore:.*too few positions")
@pytest.mark.parametrize("curvature", ["ekfac", "fisher"])
def test_resnet9_from_end_to_end(tmp_path, curvature):
    options = ["--quick", "--pairs", "digits-resnet9", "--out", str(tmp_path), "--rows", "80", "--targets", "8"]
    options += ["--curvature", curvature]
    args = example.parse([*options, "--groups", "3", "--sizes", "0.1", "--epochs", "4", "--width", "2"])
    assert {row["method"] for row in example.study("digits-resnet9", args)} >= {"F", "F+I", "TracIn", "TRAK"}
    assert json.loads((tmp_path / "digits-resnet9-0.jsonl").read_text().splitlines()[0])["settings"]["width"] == 2


def test_regression_from_end_to_end(tmp_path):
    folder = data(tmp_path)
    options = ["--quick", "--data", str(folder), "--pairs", "concrete-mlp", "--out", str(tmp_path / "out")]
    args = example.parse(
        [*options, "--rows", "60", "--targets", "20", "--groups", "4", "--sizes", "0.1", "--epochs", "2"]
    )
    rows = example.study("concrete-mlp", args)
    assert {row["method"] for row in rows} == ALL
    kept = (tmp_path / "out" / "concrete-mlp-0.jsonl").read_bytes()
    assert example.study("concrete-mlp", args) == rows
    assert (tmp_path / "out" / "concrete-mlp-0.jsonl").read_bytes() == kept


def test_ekfac_says_where_the_newton_step_is_not_defined(capsys):
    class Refusing:
        def estimates(self, groups, method, change):
            if method.startswith("N"):
                raise ValueError("no positive definite rest")
            return torch.zeros(len(groups))

    found = group_estimates.estimates(Refusing(), {"TRAK": torch.tensor([1.0, 2.0, 4.0])}, [(0, 2), (1,)])
    assert set(found) == {"F", "F+I", "F+B", "F+I+B", "TRAK"}
    assert found["TRAK"].tolist() == [5, 2]
    assert "N+I is not defined here: no positive definite rest" in capsys.readouterr().out


def test_ekfac_estimates_are_those_of_the_library():
    made = pair(n=40)
    effects = group_estimates.ekfac_effects(made, nn.Sequential(nn.Linear(4, 3)).double())
    assert effects.curvature.damping == DECAY
    assert effects.estimates([(0, 1)], "F").shape == (1,)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pairs", "mnist-mlp"], "expected --pairs among those whose data is there"),
        (["--sizes", "1.5"], "expected --sizes as shares of the rows"),
        (["--data", "no/such/folder"], "for others give --data DIR"),
        (["--pairs", "digits-resnet9", "--curvature", "hessian"], "expected --curvature fisher or ekfac for ResNet-9"),
        (["--device", "nowhere"], "expected --device to be one that this machine has"),
    ],
)
def test_arguments_that_do_not_fit(arguments, says, capsys, monkeypatch):
    monkeypatch.delenv("LI_DATA", raising=False)
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert says in capsys.readouterr().err
