from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

from lightning_influence.capture.component import find_components
from lightning_influence.store import manifest


@pytest.fixture
def components():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 5, bias=False))
    model[3].weight = model[0].weight
    return find_components(model)


def test_components_survive_json(components):
    written = json.dumps([manifest.component_to_json(component) for component in components])
    assert [manifest.component_from_json(value) for value in json.loads(written)] == components


def test_the_same_components_do_not_differ(components):
    assert not list(manifest.component_differences(components, list(reversed(components))))


def test_every_difference_of_components_is_named(components):
    wider = replace(components[1], shape=(3, 9), kind="conv")
    named = list(manifest.component_differences(components, [wider, replace(components[0], name="new")]))
    assert named == [
        "component 'new': asked for, but not in the store",
        "component '0': in the store, but not asked for",
        "component '2': in the store, but not asked for",
        "component '1', kind: stored 'linear', asked 'conv'",
        "component '1', shape: stored [3, 4], asked [3, 9]",
    ]


def test_settings_that_are_not_asked_for_are_not_compared():
    stored = {"seed": 0, "reduction": "sum"}
    assert not list(manifest.setting_differences(stored, {"seed": 0}))
    assert list(manifest.setting_differences(stored, {"seed": 1, "damping": None})) == [
        "setting 'seed': stored 0, asked 1",
        "setting 'damping': not stored, asked None",
    ]


def test_package_versions_are_those_of_installed_packages():
    versions = manifest.package_versions()
    assert versions["torch"].startswith("2.")
    assert set(versions) <= set(manifest.PACKAGES)
