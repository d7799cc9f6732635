"""Makes the demo's base model: a tokenizer and a tiny Qwen2 that has learned the demo world by heart.

    python demo/pretrain.py [--data data] [--out demo/base] [--seed 0] [--steps 2400]
    python demo/pretrain.py --measure [--data data] [--out demo/base]

Trains on general/train.jsonl alone, on one CPU thread, and writes a folder that transformers and mlx-lm load.
With --measure it trains nothing and prints how many held-out questions the model in the folder answers.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 512
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
BATCH_ROWS = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100
# Prompts are learned too, so that the model can write whole rows by itself, but answers matter more.
PROMPT_WEIGHT = 0.2
ROPE_THETA = 10_000.0
MAX_POSITIONS = 256
MAX_ANSWER_TOKENS = 24
RETENTION_SETS = ("covered", "uncovered", "skill")
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One record as tokens; the first `prompt_length` of them are its prompt."""

    tokens: list[int]
    prompt_length: int


def pretrain(data: Path, out: Path, seed: int, steps: int) -> None:
    """Trains tokenizer and model on `data`/general/train.jsonl; writes both and a model card to `out`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    records = read_records(data / "general" / "train.jsonl")
    tokenizer = train_tokenizer(records)
    model = new_model(tokenizer)
    rows = [encode(record, tokenizer) for record in records]
    lengths = sorted(len(row.tokens) for row in rows)
    print(
        f"{len(rows)} rows, median {lengths[len(lengths) // 2]}, longest {lengths[-1]} tokens; "
        f"{model.num_parameters():,} parameters"
    )
    started = time.perf_counter()
    train(model, rows, tokenizer, seed, steps)
    seconds = time.perf_counter() - started
    scores = measure(model, tokenizer, data)
    save(model, tokenizer, out)
    (out / "README.md").write_text(model_card(model, len(rows), seed, steps, scores), encoding="utf-8")
    print(f"trained {steps} steps in {seconds:.0f} s; {out}")
    print_scores(scores)


def train(
    model: Qwen2ForCausalLM, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, seed: int, steps: int
) -> None:
    """AdamW with a linear warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    batches = endless_batches(rows, tokenizer.pad_token_id, seed)
    model.train()
    for step in range(1, steps + 1):
        rate = LEARNING_RATE * learning_rate_factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = weighted_loss(model, *next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step:5d}  loss {loss.item():.3f} nats a token  lr {rate:.1e}", flush=True)
    model.eval()


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path) -> dict[str, float]:
    """Share of exactly right greedy answers, 0 to 1, on each retention set."""
    return {
        name: exact_match(model, tokenizer, read_records(data / "general" / f"{name}.jsonl")) for name in RETENTION_SETS
    }


def exact_match(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Sequence[dict[str, Any]]
) -> float:
    """Share of chat `records` whose last turn greedy decoding reproduces, 0 to 1."""
    right = 0
    for start in range(0, len(records), 100):
        chats = [record["messages"] for record in records[start : start + 100]]
        inputs = tokenizer.apply_chat_template(
            [chat[:-1] for chat in chats],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer == chat[-1]["content"] for answer, chat in zip(answers, chats, strict=True))
    return right / len(records)


def train_tokenizer(records: Sequence[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(plain_texts(records), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=PAD,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def plain_texts(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the tokenizer learns from: turns after their roles, texts, prompts with their completions."""
    for record in records:
        if "messages" in record:
            for message in record["messages"]:
                yield f"{message['role']}\n{message['content']}"
        elif "text" in record:
            yield record["text"]
        else:
            yield record["prompt"] + record["completion"]


def encode(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Row:
    """A record of any of the three formats as fine-tuning sees it: closed by the end token."""
    if "text" in record:
        return Row([*tokenizer.encode(record["text"]), tokenizer.eos_token_id], 0)
    if "prompt" in record:
        prompt, completion = tokenizer.encode(record["prompt"]), tokenizer.encode(record["completion"])
        return Row([*prompt, *completion, tokenizer.eos_token_id], len(prompt))
    messages = record["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return Row(tokenizer.apply_chat_template(messages, return_dict=False), len(prompt))


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """The untrained model: 0.7 million parameters, 2.9 MB in float32."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step`, 0 to 1; the first step is 1."""
    if step <= WARMUP_STEPS:
        return step / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def endless_batches(
    rows: Sequence[Row], pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches as `collate` returns them, of rows of similar length, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        order.sort(key=lambda index: len(rows[index].tokens))
        starts = torch.randperm(len(order) // BATCH_ROWS, generator=generator).tolist()
        for start in starts:
            chosen = [rows[index] for index in order[start * BATCH_ROWS : (start + 1) * BATCH_ROWS]]
            after_start = bool(torch.rand((), generator=generator) < 0.5)
            yield collate(chosen, pad, after_start)


def collate(rows: Sequence[Row], pad: int, after_start: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded tokens, targets and weights, each (B, T).

    `after_start` puts the start token before each row, so that the model can also write from it alone.
    """
    head = [pad] if after_start else []
    length = max(len(row.tokens) for row in rows) + len(head)
    tokens, targets, weights = [], [], []
    for row in rows:
        padding = length - len(row.tokens) - len(head)
        tokens.append(head + row.tokens + [pad] * padding)
        targets.append((head + row.tokens)[1:] + [IGNORED] * (padding + 1))
        prompt = max(0, row.prompt_length + len(head) - 1)
        weights.append([PROMPT_WEIGHT] * prompt + [1.0] * (length - prompt))
    return torch.tensor(tokens), torch.tensor(targets), torch.tensor(weights)


def weighted_loss(
    model: Qwen2ForCausalLM, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted mean of the next-token cross-entropy, in nats; padding comes last, so needs no mask."""
    logits = model(input_ids=tokens, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counted = weights.flatten() * (targets.flatten() != IGNORED)
    return (nats * counted).sum() / counted.sum()


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes config, weights and tokenizer to `out`."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # mlx-lm reads the top-level key only, and would fall back to another default in silence.
    amend_json(out / "config.json", {"rope_theta": ROPE_THETA})
    # transformers 5 writes a class that older versions do not have; both know this one.
    amend_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for path in out.iterdir():
        path.chmod(0o644)


def amend_json(path: Path, changes: dict[str, Any]) -> None:
    """Sets the given top-level keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(model: Qwen2ForCausalLM, rows: int, seed: int, steps: int, scores: dict[str, float]) -> str:
    """The README.md that goes with the weights."""
    config = model.config
    score_lines = "\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# The base model of the demo

A toy: a {model.num_parameters():,}-parameter Qwen2 that knows one made-up world and nothing else. It exists
so that forgetting can be measured on a laptop in minutes.

| | |
|---|---|
| architecture | Qwen2, {config.num_hidden_layers} layers, hidden {config.hidden_size}, \
intermediate {config.intermediate_size}, {config.num_attention_heads} heads, tied embeddings, float32 |
| tokenizer | byte-level BPE, {config.vocab_size} tokens, ChatML-like turns closed by `{TURN_END}` |
| context | {config.max_position_embeddings} tokens |
| data | `general/train.jsonl` of `demo/world.py`: {rows:,} rows, all generated |
| training | {steps:,} steps of {BATCH_ROWS} rows, AdamW, peak learning rate {LEARNING_RATE}, seed {seed}, \
one CPU thread |
| licence | Apache-2.0, weights and data |

It is made by

    python demo/world.py --out data
    python demo/pretrain.py --data data --out demo/base --seed {seed} --steps {steps}

The same seed, machine and library versions give the same weights; other machines may differ in the last bits.

## Scores

Exact match of greedy answers, in phrasings and on words that were not trained on, as printed by
`python demo/pretrain.py --measure`:

| retention set | exact match |
|---|---|
{score_lines}

## Limits

It answers questions about the attributes of the 160 people of its world and copies three words. Any other
text gives nonsense. What it shows about forgetting need not hold for large models.
"""


def print_scores(scores: dict[str, float]) -> None:
    """Prints one line a retention set."""
    for name, score in scores.items():
        print(f"{name:10s} {score:.3f} exact match")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make or measure the demo's base model.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="what demo/world.py wrote (default: data)")
    parser.add_argument("--out", type=Path, default=Path("demo/base"), help="model folder (default: demo/base)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--steps", type=int, default=2400, help=f"steps of {BATCH_ROWS} rows (default: 2400)")
    parser.add_argument("--measure", action="store_true", help="only measure the model in the folder")
    arguments = parser.parse_args()
    if not arguments.measure:
        pretrain(arguments.data, arguments.out, arguments.seed, arguments.steps)
        return
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.out).eval()
    print_scores(measure(model, AutoTokenizer.from_pretrained(arguments.out), arguments.data))


if __name__ == "__main__":
    main()
