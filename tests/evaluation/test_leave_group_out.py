from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_influence.evaluation.leave_group_out import GroupChanges, leave_group_out
from lightning_influence.evaluation.retraining import Retraining
from tests.evaluation.retraining_cases import Counted

GROUPS = [(1, 2), (0,), (4, 5, 6)]


def noisy(ids, seed):
    """A mean of what is trained on, with noise by seed that is not the same for all sets."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(ids))
    return sum(ids) / len(ids) + 0.1 * float(torch.randn((), generator=generator)) + 5 * seed


def test_changes_are_those_of_the_same_seed():
    found = leave_group_out(Retraining(noisy, progress=False), GROUPS, 10, 4)
    assert found.base.tolist() == [noisy(tuple(range(10)), seed) for seed in range(4)]
    for row, group in enumerate(GROUPS):
        rest = tuple(k for k in range(10) if k not in group)
        changes = torch.tensor([noisy(rest, s) - noisy(tuple(range(10)), s) for s in range(4)], dtype=torch.float64)
        torch.testing.assert_close(found.changes[row], changes)
        assert found.mean[row].item() == pytest.approx(changes.mean().item())
        assert found.standard_error[row].item() == pytest.approx(stats.sem(changes.numpy()))
    assert [(row["anchor"], row["size"]) for row in found.rows()] == [(1, 2), (0, 1), (4, 3)]
    assert found.rows()[1]["change"] == found.mean[1].item()


def test_what_is_trained_and_kept(tmp_path):
    train = Counted(lambda ids, seed: [float(len(ids)), 3.0])
    ids = list("abcd")
    found = leave_group_out(Retraining(train, path=tmp_path / "x.jsonl", progress=False), [["b", "c"]], ids, [7])
    assert train.calls == [(("a", "b", "c", "d"), 7), (("a", "d"), 7)]
    assert found.mean.tolist() == [(2 + 3) / 2 - (4 + 3) / 2]
    assert math.isnan(found.standard_error.item())
    assert math.isnan(found.reliability)
    again = Retraining(Counted(stop=0), path=tmp_path / "x.jsonl", progress=False)
    assert torch.equal(leave_group_out(again, [["b", "c"]], ids, [7]).losses, found.losses)


def test_agreement_is_with_the_mean():
    found = leave_group_out(Retraining(noisy, progress=False), GROUPS, 10, 4)
    report = found.agreement({"truth": found.mean, "opposite": -found.mean})
    assert report.line("truth").measures == {"spearman": 1, "kendall": 1, "mae": 0}
    assert report.line("opposite").measures["spearman"] == -1


def test_reliability_tells_the_agreement_with_other_seeds():
    """Against what it stands for: means over 4 seeds correlated with means over 4 others."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2000, 1, generator=generator).double()
    losses = truth + 2 * torch.randn(2000, 8, generator=generator)
    groups = tuple((k,) for k in range(2000))
    own = GroupChanges(groups, tuple(range(4)), torch.zeros(4), losses[:, :4])
    other = stats.spearmanr(own.mean, losses[:, 4:].mean(1)).statistic
    assert own.reliability == pytest.approx(other, abs=0.04)
    same = GroupChanges(groups, (0, 1), torch.zeros(2), truth.expand(-1, 2))
    assert same.reliability == pytest.approx(1)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "expected at least one group"),
        ([[0], []], "Group 1 has none"),
        ([[0, 0]], "Group 0 has ids 0, 0"),
        ([[0, 9]], "Group 0 has unknown id 9"),
        ([[2, 1, 0]], "not all of them. Group 0"),
    ],
)
def test_groups_that_cannot_be_left_out(groups, message):
    with pytest.raises(ValueError, match=message):
        leave_group_out(Retraining(Counted(stop=0), progress=False), groups, 3)
