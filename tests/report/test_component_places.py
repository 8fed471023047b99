"""Names of real models have a place each."""

from __future__ import annotations

import pytest

from lightning_influence.report.component_places import Place, find_places

LLAMA = [
    ("model.embed_tokens", None, "embedding"),
    ("model.layers.3.input_layernorm", 3, "input_layernorm"),
    ("model.layers.3.self_attn.q_proj", 3, "q_proj"),
    ("model.layers.3.mlp.up_proj", 3, "up_proj"),
    ("model.layers.12.mlp.up_proj", 12, "up_proj"),
    ("model.norm", None, "norm"),
    ("lm_head", None, "lm_head"),
]
GPT2 = [
    ("transformer.wte", None, "wte"),
    ("transformer.wpe", None, "wpe"),
    ("transformer.h.3.attn.c_attn", 3, "c_attn"),
    ("transformer.h.3.attn.c_proj", 3, "attn.c_proj"),
    ("transformer.h.3.mlp.c_fc", 3, "c_fc"),
    ("transformer.h.3.mlp.c_proj", 3, "mlp.c_proj"),
    ("transformer.h.4.mlp.c_proj", 4, "mlp.c_proj"),
    ("transformer.ln_f", None, "ln_f"),
]
NEOX = [
    ("gpt_neox.embed_in", None, "embed_in"),  # two that embed: each is called by its own name
    ("gpt_neox.layers.0.attention.query_key_value", 0, "query_key_value"),
    ("gpt_neox.layers.0.attention.dense", 0, "dense"),
    ("gpt_neox.layers.0.mlp.dense_h_to_4h", 0, "dense_h_to_4h"),
    ("gpt_neox.final_layer_norm", None, "final_layer_norm"),
    ("embed_out", None, "embed_out"),
]
LORA = [
    ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.default", 2, "q_proj.lora_A"),
    ("base_model.model.model.layers.2.self_attn.q_proj.lora_B.default", 2, "q_proj.lora_B"),
    ("base_model.model.model.layers.5.self_attn.q_proj.lora_A.default", 5, "q_proj.lora_A"),
]
BOTH_SIDES = [
    ("encoder.block.0.layer.0.SelfAttention.q", 0, "encoder.block.layer.0.SelfAttention.q"),
    ("decoder.block.0.layer.0.SelfAttention.q", 0, "decoder.block.layer.0.SelfAttention.q"),
    ("decoder.block.1.layer.0.SelfAttention.k", 1, "k"),
]
EXPERTS = [(f"model.layers.1.mlp.experts.{e}.up_proj", 1, f"mlp.experts.{e}.up_proj") for e in range(3)]
PLAIN = [("net.0", 0, "net"), ("net.4", 4, "net"), ("head", None, "head")]


@pytest.mark.parametrize("expected", [LLAMA, GPT2, NEOX, LORA, BOTH_SIDES, EXPERTS, PLAIN])
def test_places_of_models(expected):
    names = [name for name, _, _ in expected]
    places = find_places(names)
    assert places == [Place(layer, kind) for _, layer, kind in expected]
    assert len(set(places)) == len(names)


def test_the_caller_knows_better():
    names = [name for name, _, _ in EXPERTS] + ["head"]
    merged = dict.fromkeys(names[:3], (1, "experts"))
    assert find_places(names, merged) == [Place(1, "experts")] * 3 + [Place(None, "head")]
    assert find_places(names, lambda name: (None, name[:5])) == [Place(None, "model")] * 3 + [Place(None, "head")]
    with pytest.raises(ValueError, match=r"`find_places\(places=\['haed'\]\)`: .* nearest to 'haed' are \['head'"):
        find_places(names, {"haed": (0, "head")})
