"""The page ``docs/errors.md``: every message of the package's errors and warnings.

    python -m tests.support.errors_page

Messages are read from the source: the text of each error that is made and of each call of ``warn``.
What a message fills in is shown as an ellipsis.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moo_balance import errors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moo_balance"
PAGE = ROOT / "docs" / "errors.md"
KINDS = {*errors.__all__, "warn"}

HEAD = """\
<!-- Written by `python -m tests.support.errors_page`. -->

# Errors and warnings

Every message of the package, with what causes it and what to do. An ellipsis (…) stands for a
name or a value of yours. To find a message, search this page for its first words; each row has an
address of its own, made from these. Every error is a `BalanceError`; wrong arguments and losses
are a `BalanceValueError`, which is a `ValueError`, too. When an error is raised, nothing has
changed: not the state of the method, nor a parameter, unless the message says so.

Most messages follow one pattern, "X should be Y. Found Z. Do W.": what was expected is the first
column, what was found the second, and what to do the third. Where the third is empty, the first
says what to pass.
"""

# The areas of the page, in its order: a heading, and the modules that belong to it.
AREAS = {
    "Making the optimizer": ("_validation", "optimizer", "_wrapper", "_several"),
    "A training step": (
        *("_balancer", "_record", "_accumulation", "_stepping", "_two_step", "_separate_steps"),
        *("_rows", "gradients", "_capture", "_satisfied"),
    ),
    "Losses and gradients that are not finite": ("_nonfinite",),
    "Mixed precision": ("_grad_scaler",),
    "Several processes": ("_distributed", "engine.distributed"),
    "Evaluating the losses again": ("_reevaluation",),
    "Checkpoints": ("_checkpoint", "_row_checkpoint"),
    "Methods": ("weighting",),
    "Engines": ("engine", "_torch_internals"),
    "Diagnosis": ("diagnosis", "_batch_gradients", "_conflict_figures", "_reports"),
    "Metrics and history": ("monitor", "history", "_history_file", "_step_metrics", "_run_figure"),
    "Functions of `moo_balance.functional`": ("functional",),
    "Integrations": ("integrations",),
}
OTHER = "Other"

# The checks of all arguments are in one module: what begins so belongs to another area.
PREFIXES = {
    r"Parameter `(losses_fn|params|batches)`|Parameter `params`, ": "Diagnosis",
    r"Loss `|`\w+` |Parameter `(losses|features)`": "A training step",
}


class Message(NamedTuple):
    """A message with its three parts; the last two may be empty."""

    area: str
    kind: str
    expected: str
    found: str
    remedy: str


# ---------------------------------------------------------------------- from the source


def read_messages() -> list[Message]:
    """All messages, in the order of the areas and then of the source."""
    collected: dict[str, list[Message]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        area = find_area(path)
        for kind, text in messages_of(ast.parse(path.read_text(encoding="utf-8"))):
            place = find_area_of_text(text) or area if path.stem == "_validation" else area
            message = Message(place, kind, *split(text))
            if message not in collected[place]:
                collected[place].append(message)
    return [message for area in (*AREAS, OTHER) for message in collected[area]]


def find_area(path: Path) -> str:
    """The area of a module: that of the longest name which it is, or lies in."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    homes = {home: area for area, modules in AREAS.items() for home in modules}
    fitting = [home for home in homes if f"{module}.".startswith(f"{home}.")]
    return homes[max(fitting, key=len)] if fitting else OTHER


def find_area_of_text(text: str) -> str | None:
    """The area of a message about an argument, if its first words tell."""
    return next((area for words, area in PREFIXES.items() if re.match(words, text)), None)


def messages_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The kind and the text of each error or warning that a module makes, from top to bottom."""
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args]
    for call in sorted(calls, key=lambda n: (n.lineno, n.col_offset)):
        kind = call.func.id if isinstance(call.func, ast.Name) else ""
        if kind in KINDS:
            text = render(call.args[0], functions)
            if text.strip("… "):
                yield kind, re.sub(r"…\.?(?:\s*…)+", "…", text)


def render(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> str:
    """The text of a string, with an ellipsis for each value; follows functions that return one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(render(value, functions) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return render(node.left, functions) + render(node.right, functions)
    if isinstance(node, ast.Call) and (name := _name(node.func)) in functions:
        returned = functions[name].body[-1]
        if isinstance(returned, ast.Return) and isinstance(returned.value, ast.JoinedStr):
            return render(returned.value, functions)
    return "…"


def _name(function: ast.expr) -> str:
    """The name of a function or method that is called."""
    named = function.id if isinstance(function, ast.Name) else ""
    return function.attr if isinstance(function, ast.Attribute) else named


# ---------------------------------------------------------------------- its parts

# A sentence ends before a capital letter, a quoted name or an ellipsis.
SENTENCE = re.compile(r"(?<=[.…])\s+(?=[A-Z`…])")


def split(text: str) -> tuple[str, str, str]:
    """What was expected, what was found, and what to do."""
    expected, separator, rest = text.partition(" Found ")
    if not separator:
        first, *others = SENTENCE.split(text.strip())
        return first, "", " ".join(others)
    found, *remedy = SENTENCE.split(rest.strip())
    return expected.strip(), found.rstrip("."), " ".join(remedy)


# ---------------------------------------------------------------------- the page


def page() -> str:
    """The whole page."""
    messages = read_messages()
    areas = [area for area in (*AREAS, OTHER) if any(m.area == area for m in messages)]
    anchors = dict(zip(messages, name_anchors(messages), strict=True))
    return HEAD + "".join(
        f"\n## {area}\n\n| message | found | what to do |\n| --- | --- | --- |\n"
        + "".join(_line(m, anchor) for m, anchor in anchors.items() if m.area == area)
        for area in areas
    )


def name_anchors(messages: list[Message]) -> list[str]:
    """For each message its first words, with a number where an earlier one has the same."""
    words = [re.findall(r"[a-z0-9]+", message.expected.lower())[:9] for message in messages]
    slugs = ["-".join(each) for each in words]
    earlier = [slugs[:place].count(slug) for place, slug in enumerate(slugs)]
    return [f"{slug}-{n + 1}" if n else slug for slug, n in zip(slugs, earlier, strict=True)]


def _line(message: Message, anchor: str) -> str:
    kind = "" if message.kind == "BalanceValueError" else f" ({_describe(message.kind)})"
    cells = [_escape(cell) for cell in (message.expected + kind, message.found, message.remedy)]
    return f'| <a id="{anchor}"></a>{" | ".join(cells)} |\n'


def _describe(kind: str) -> str:
    return "a warning" if kind == "warn" else f"`{kind}`"


def _escape(cell: str) -> str:
    """Text that means the same in a table of Markdown; code in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", cell))
    plain = (re.sub(r"([*_<\[\]$])", r"\\\1", part) for part in parts[::2])
    mixed = [text for pair in zip(plain, [*parts[1::2], ""], strict=True) for text in pair]
    return "".join(mixed).replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
