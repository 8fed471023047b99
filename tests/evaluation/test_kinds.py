from __future__ import annotations

import re

import pytest

from lightning_influence.evaluation.kinds import component_kinds, kind_of
from tests.evaluation.retrieval_cases import NAMES


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.mlp.up_proj", "up_proj"),
        ("model.layers.11.mlp.up_proj.weight", "up_proj"),
        ("transformer.h.0.attn.c_attn", "c_attn"),
        ("transformer.wte", "embedding"),
        ("gpt_neox.embed_in", "embedding"),
        ("model.embed_tokens", "embedding"),
        ("embeddings", "embedding"),
        ("embedder", "embedder"),
        ("base.layers.0.q_proj.lora_B.default", "q_proj.lora_B"),
        ("lora_A", "lora_A"),
        ("0", "0"),
        ("net.12", "net"),
        ("lm_head", "lm_head"),
    ],
)
def test_kind_of(name, kind):
    assert kind_of(name) == kind


def test_kinds_in_the_order_of_the_model():
    assert component_kinds(NAMES) == {
        "embedding": [NAMES[0]],
        "q_proj": [NAMES[1], NAMES[3]],
        "k_proj": [NAMES[2], NAMES[4]],
        "up_proj": [NAMES[5]],
    }


def test_kinds_of_the_users_own():
    assert component_kinds(NAMES, {NAMES[5]: "late", NAMES[3]: "late"}) == {"late": [NAMES[3], NAMES[5]]}
    assert list(component_kinds(NAMES, lambda name: name.split(".")[2] if "layers" in name else "-")) == ["-", "0", "1"]


def test_names_that_match_nothing():
    message = (
        "`evaluate_retrieval(kinds=['model.layers.1.mlp.up'])`: expected names of components; the nearest to "
        "'model.layers.1.mlp.up' are ['model.layers.1.mlp.up_proj',"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        component_kinds(NAMES, {"model.layers.1.mlp.up": "up"})
