"""The model of the study, its own completions, and a tiny model for a quick look, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from instruction_pool import InstructionDataset, InstructionRow, PadRight, chat_tokens
from torch.utils.data import DataLoader

from lightning_influence import LanguageModelLoss
from lightning_influence.store.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}[user] {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SPECIAL = ("[pad]", "[end]", "[unknown]", "[user]", "[assistant]")


def tiny_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """One token for every word and sign of the texts, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="[unknown]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[pad]",
        eos_token="[end]",
        unk_token="[unknown]",
        additional_special_tokens=["[user]", "[assistant]"],
        chat_template=TEMPLATE,
    )


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Of a folder as ``save_pretrained`` leaves it, with the chat template of `tiny_tokenizer` if it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    return tokenizer


def folder_model(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A Llama of 3 layers with tied embeddings and grouped-query attention, at random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def train(model: PreTrainedModel, data: InstructionDataset, pad: PadRight, steps: int, seed: int) -> None:
    """A few steps of Adam on the answers, 16 rows each."""
    order = torch.Generator().manual_seed(seed)
    optimizer, loss, done = torch.optim.Adam(model.parameters(), lr=1e-3), LanguageModelLoss("mean"), 0
    model.train()
    while done < steps:
        for batch in DataLoader(data, 16, shuffle=True, collate_fn=pad, generator=order):
            optimizer.zero_grad()
            loss.losses(model, batch).mean().backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    optimizer.zero_grad()
    model.eval()


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[InstructionRow],
    file: Path,
    max_new_tokens: int,
    done: Callable[[int], object],
    batch_size: int = 16,
) -> list[str]:
    """The model's own answer to each prompt, token by token the most likely one, up to a number of tokens.

    Kept in a file, which is used again as long as prompts, model and limit are the same.
    """
    head = {"model": model_fingerprint(model), "max_new_tokens": max_new_tokens}
    if file.exists():
        first, *lines = [json.loads(line) for line in file.read_text().splitlines()]
        if first == head and [line["prompt"] for line in lines] == [row.question for row in rows]:
            return [line["completion"] for line in lines]
    found = [""] * len(rows)
    prompts = [chat_tokens(row, tokenizer)[0] for row in rows]
    for places in _batches(list(map(len, prompts)), batch_size):
        texts = _decode(model, tokenizer, [prompts[k] for k in places], max_new_tokens)
        for place, text in zip(places, texts, strict=True):
            found[place] = text
        done(len(places))
    lines = [{"prompt": row.question, "completion": text} for row, text in zip(rows, found, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    return found


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Places, prompts of similar length together."""
    order = sorted(range(len(lengths)), key=lambda k: -lengths[k])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def _decode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], limit: int
) -> list[str]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    written = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)]
