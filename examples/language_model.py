"""Find the lines of a text from which a small character model learned a rare fact.

The text is generated. Every line names an animal and its sound; one animal occurs in four lines
only. The query is the loss on the letters of its sound. The model has tied embeddings.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import backtrail

SOUNDS = {"cow": "moo", "dog": "woof", "cat": "meow", "owl": "hoot"}
LENGTH = 22  # letters of a line
WIDTH = 16
HEADS = 2

torch.manual_seed(0)
draws = torch.randint(3, (128,)).tolist()
animals = [
    "owl" if number % 32 == 7 else ["cow", "dog", "cat"][draw] for number, draw in enumerate(draws)
]
lines = [
    f"{number:03d} the {animal} says {SOUNDS[animal]}" for number, animal in enumerate(animals)
]
letters = sorted({letter for line in lines for letter in line} | {" "})


def encoded(some: list[str]) -> TensorDataset:
    """Encode lines as letters and next letters, both [line, place]; -100 where there is none."""
    numbers = torch.full((len(some), LENGTH + 1), -100)
    for row, line in zip(numbers, some, strict=True):
        row[: len(line)] = torch.tensor([letters.index(letter) for letter in line])
    return TensorDataset(numbers[:, :-1].clamp(min=0), numbers[:, 1:].contiguous())


class TinyGPT(nn.Module):
    """One block of causal attention; the output layer shares the weight of the embedding."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.letters = nn.Embedding(len(letters), WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.before = nn.LayerNorm(WIDTH)
        self.after = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, len(letters), bias=False)
        self.head.weight = self.letters.weight
        nn.init.normal_(self.letters.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits of the next letter, `[row, place, letter]`."""
        x = self.letters(tokens) + self.places.weight[: tokens.shape[1]]
        # [row, place, 3 * width] -> three tensors [row, head, place, width / heads]
        q, k, v = self.mix(self.before(x)).view(*tokens.shape, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + seen.transpose(1, 2).flatten(2)
        scores: Tensor = self.head(x + self.feed(self.after(x)))
        return scores


train_set = encoded(lines)
model = TinyGPT()
# Adam's first update is g / (|g| + eps). With eps = 1e-8 its derivative is huge where a gradient is
# near 1e-8 (a rare letter): influence of the first batch is then exact, but does not predict
# removals.
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
task = backtrail.language_model(model, train_set)
folder = tempfile.mkdtemp()

with backtrail.Recorder(folder, task, optimizer) as recorder:
    for _ in range(10):
        for batch in recorder.watch(DataLoader(train_set, batch_size=16, shuffle=True)):
            task.loss(model(batch[0]), batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

run = backtrail.open_run(folder, task)
prompt = "555 the owl says "
answer = "hoot"
test_set = encoded([prompt + answer])
test_set.tensors[1][:, : len(prompt) - 1] = -100  # the loss of the letters of the answer only
queries = backtrail.Loss(test_set, samples=[0], unit="nats")
influence = backtrail.DIT().attribute(run, queries)
top = influence.top(5, order="helpful")
actual = backtrail.leave_one_out(run, queries, samples=top["sample"].to_list())[0]

print(run)
print(
    f"most helpful lines for continuing {prompt!r} with {answer!r}, in nats "
    "(in brackets: measured by retraining without it)"
)
for (rank, sample, score), truth in zip(top.iter_rows(), actual, strict=True):
    print(f"  {rank}. {score:+.3f} ({truth:+.3f})  {lines[sample]}")
print(f"lines about owls: {animals.count('owl')} of {len(lines)}")
