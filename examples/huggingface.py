"""Find the sentences from which a small GPT-2 of `transformers` learned that owls hoot.

The model is trained with its own loss on padded sentences. It is tiny and made from a
configuration, so nothing is downloaded. In some sentences the fact is wrong on purpose: their owls
bark. Needs the extra `hf`: `pip install '.[hf]'` in a checkout.
"""

import logging
import tempfile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import backtrail

SOUNDS = {"cow": "moos", "dog": "barks", "cat": "meows", "owl": "hoots"}
EXTRA = ["", "at night", "in the old barn"]
WRONG = 5
Row = dict[str, torch.Tensor]

logging.getLogger("transformers").setLevel(logging.ERROR)  # GPT-2 logs which loss it uses
torch.manual_seed(0)
animals = [list(SOUNDS)[draw] for draw in torch.randint(4, (96,)).tolist()]
owls = [number for number, animal in enumerate(animals) if animal == "owl"]
sounds = [
    SOUNDS["dog"] if number in owls[:WRONG] else SOUNDS[animal]
    for number, animal in enumerate(animals)
]
lines = [
    f"the {animal} {sound} {EXTRA[i % 3]}"
    for i, (animal, sound) in enumerate(zip(animals, sounds, strict=True))
]
words = sorted({word for line in lines for word in line.split()})


def tokens(line: str) -> Row:
    """Encode a sentence as word numbers, [token]."""
    return {"input_ids": torch.tensor([words.index(word) for word in line.split()])}


def padded(rows: list[Row]) -> Row:
    """Pad rows to a batch; padding is masked in the attention and ignored in the labels (-100)."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
    }


size = {"vocab_size": len(words), "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
# The output layer and the embedding are one parameter (tied).
model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
model.train()
train_set: Any = [tokens(line) for line in lines]
# The gradients of the keys' biases are zero in theory and rounding in practice. With eps=1e-8 Adam
# would amplify that rounding.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=12)
# model(**batch).loss is a mean over all tokens of the batch, so the task declares the same mean.
task = backtrail.language_model(model, train_set, collate=padded, reduce=backtrail.TokenMean())
folder = tempfile.mkdtemp()

with backtrail.Recorder(folder, task, optimizer) as recorder:
    loader = DataLoader(train_set, batch_size=16, shuffle=True, collate_fn=padded)
    for _ in range(8):
        for batch in recorder.watch(loader):
            model(**batch).loss.backward()
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()

run = backtrail.open_run(folder, task)
queries = backtrail.Loss([tokens("the owl hoots")], samples=[0], unit="nats")
influence = backtrail.DIT().attribute(run, queries)

print(run)
for order in ("helpful", "harmful"):
    top = influence.top(WRONG, order=order)
    actual = backtrail.leave_one_out(run, queries, samples=top["sample"].to_list())[0]
    print(
        f"most {order} to the loss of 'the owl hoots', in nats "
        "(in brackets: measured by retraining without it)"
    )
    for (rank, sample, score), truth in zip(top.iter_rows(), actual, strict=True):
        print(f"  {rank}. {score:+.3f} ({truth:+.3f})  {lines[sample]}")
