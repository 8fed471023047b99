"""Choosing a subset of the training data: rules, budgets and what they return."""

from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.budget import check_budget, resolve_budget
from lightning_influence.selection.interaction_greedy import InteractionGreedy
from lightning_influence.selection.random import Random
from lightning_influence.selection.selection import Selection
from lightning_influence.selection.top_k import TopK

__all__ = [
    "InteractionGreedy",
    "Random",
    "Selection",
    "SelectionRule",
    "TopK",
    "check_budget",
    "resolve_budget",
]
