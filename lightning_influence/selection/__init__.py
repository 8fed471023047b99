"""Choosing a subset of the training data or of the components: rules, budgets and what they return."""

from lightning_influence.selection.aggregate import (
    aggregate,
    select_by_scores,
    target_interactions,
    target_scores,
)
from lightning_influence.selection.balanced_random import BalancedRandom
from lightning_influence.selection.base import SelectionRule
from lightning_influence.selection.block_greedy import BlockGreedy
from lightning_influence.selection.budget import TokenBudget, check_budget, resolve_budget
from lightning_influence.selection.certificate import certify
from lightning_influence.selection.component_cross_validation import (
    ComponentCrossValidation,
    ComponentSplit,
    cross_validate_components,
)
from lightning_influence.selection.component_greedy import (
    component_score,
    component_values,
    greedy_components,
    single_component_scores,
)
from lightning_influence.selection.component_pairs import ComponentPairs
from lightning_influence.selection.component_path import ComponentPath, ComponentSelection
from lightning_influence.selection.constraints import Constraints
from lightning_influence.selection.facility_location import FacilityLocation
from lightning_influence.selection.held_out import held_out_pool, held_out_ridge, held_out_weight
from lightning_influence.selection.held_out_choice import HeldOutChoice
from lightning_influence.selection.interaction_greedy import InteractionGreedy
from lightning_influence.selection.newton import Newton
from lightning_influence.selection.newton_greedy import NewtonGreedy
from lightning_influence.selection.newton_pool import NewtonPool
from lightning_influence.selection.random import Random
from lightning_influence.selection.redundancy_filter import RedundancyFilter
from lightning_influence.selection.refinement import refine
from lightning_influence.selection.ridge_choice import RidgeChoice
from lightning_influence.selection.round_robin import RoundRobin
from lightning_influence.selection.saturation import (
    gain_curve,
    saturating_ridge,
    saturating_weight,
    select_at_saturation,
)
from lightning_influence.selection.selection import Selection
from lightning_influence.selection.sharded_greedy import select_sharded
from lightning_influence.selection.stochastic_greedy import StochasticGreedy
from lightning_influence.selection.submodlib import Submodlib
from lightning_influence.selection.top_k import TopK

__all__ = [
    "BalancedRandom",
    "BlockGreedy",
    "ComponentCrossValidation",
    "ComponentPairs",
    "ComponentPath",
    "ComponentSelection",
    "ComponentSplit",
    "Constraints",
    "FacilityLocation",
    "HeldOutChoice",
    "InteractionGreedy",
    "Newton",
    "NewtonGreedy",
    "NewtonPool",
    "Random",
    "RedundancyFilter",
    "RidgeChoice",
    "RoundRobin",
    "Selection",
    "SelectionRule",
    "StochasticGreedy",
    "Submodlib",
    "TokenBudget",
    "TopK",
    "aggregate",
    "certify",
    "check_budget",
    "component_score",
    "component_values",
    "cross_validate_components",
    "gain_curve",
    "greedy_components",
    "held_out_pool",
    "held_out_ridge",
    "held_out_weight",
    "refine",
    "resolve_budget",
    "saturating_ridge",
    "saturating_weight",
    "select_at_saturation",
    "select_by_scores",
    "select_sharded",
    "single_component_scores",
    "target_interactions",
    "target_scores",
]
