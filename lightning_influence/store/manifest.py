"""What a store says about itself, and how that differs from what a caller has at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from lightning_influence.capture.component import Component, Use

FORMAT_VERSION = 1
PACKAGES = ("lightning-influence", "torch", "lightning", "numpy", "safetensors", "pyarrow")


def package_versions() -> dict[str, str]:
    """Versions of the packages that shaped the numbers; one that is not installed is left out."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def component_to_json(component: Component) -> dict[str, Any]:
    """Everything that makes up a component, as JSON."""
    return {
        "name": component.name,
        "kind": component.kind,
        "uses": [[use.module, list(use.parameters)] for use in component.uses],
        "parameters": list(component.parameters),
        "shape": list(component.shape),
    }


def component_from_json(value: Mapping[str, Any]) -> Component:
    """Inverse of `component_to_json`."""
    return Component(
        name=value["name"],
        kind=value["kind"],
        uses=tuple(Use(module, tuple(parameters)) for module, parameters in value["uses"]),
        parameters=tuple(value["parameters"]),
        shape=tuple(value["shape"]),
    )


def fingerprint_differences(stored: str, asked: str) -> Iterator[str]:
    """One line when the weights are others."""
    if stored != asked:
        yield f"model fingerprint {stored[:12]}... != {asked[:12]}...: the store belongs to other weights"


def component_differences(stored: Iterable[Component], asked: Iterable[Component]) -> Iterator[str]:
    """One line for each component that only one side has or that differs."""
    left = {component.name: component for component in stored}
    right = {component.name: component for component in asked}
    yield from (f"component {name!r}: asked for, but not in the store" for name in right if name not in left)
    yield from (f"component {name!r}: in the store, but not asked for" for name in left if name not in right)
    for name in (name for name in left if name in right):
        for attribute, value in component_to_json(left[name]).items():
            other = component_to_json(right[name])[attribute]
            if value != other:
                yield f"component {name!r}, {attribute}: stored {value!r}, asked {other!r}"


def setting_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """One line for each setting asked for that is stored otherwise or not at all."""
    for name, value in asked.items():
        if name not in stored:
            yield f"setting {name!r}: not stored, asked {value!r}"
        elif stored[name] != value:
            yield f"setting {name!r}: stored {stored[name]!r}, asked {value!r}"
