"""The manual shows what the library does now: figures, messages, worths, and other libraries."""

from __future__ import annotations

import pydoc
import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import moo_balance
from docs._figures import manual
from moo_balance import functional
from tests.support import errors_page

DOCS = Path(__file__).parents[1] / "docs"


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize("name", manual.FIGURES)
def test_a_figure_shows_what_the_library_computes(name):
    drawing = manual.FIGURES[name]
    drawn, now = (flatten(data) for data in (manual.read(name), drawing.measure()))
    assert drawn.keys() == now.keys()
    for key, value in drawn.items():
        assert now[key] == pytest.approx(value, rel=drawing.tolerance, abs=drawing.tolerance), key


def flatten(data, path=()):
    if isinstance(data, (dict, list)):
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        return {k: v for key, value in pairs for k, v in flatten(value, (*path, key)).items()}
    return {path: data}


@pytest.mark.parametrize("name", manual.FIGURES)
def test_a_figure_is_drawn_from_its_data(name, tmp_path):
    committed = (manual.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("drawn by another version of matplotlib")
    redrawn = manual.write(name, manual.read(name), tmp_path)
    assert redrawn.read_text(encoding="utf-8") == committed, f"run python -m {manual.__name__}"


@pytest.mark.parametrize("name", manual.FIGURES)
def test_a_figure_is_on_a_page_with_a_description(name):
    pattern = rf"!\[[^\]]{{20,}}\]\(figures/manual/{name}\.svg\)"
    assert any(re.search(pattern, page.read_text()) for page in DOCS.glob("*.md"))


# ---------------------------------------------------------------------- messages


def test_the_page_of_errors_has_all_messages():
    assert errors_page.PAGE.read_text() == errors_page.page(), (
        f"run python -m {errors_page.__name__}"
    )


def test_a_message_is_on_the_page_in_its_parts():
    with pytest.raises(moo_balance.BalanceValueError) as raised:
        moo_balance.History(maxlen=0)
    expected, found, remedy = errors_page.split(str(raised.value))
    assert (found, remedy) == ("0", "")
    assert f">{expected} |" in errors_page.PAGE.read_text()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("X should be Y. Found Z. Do W.", ("X should be Y.", "Z", "Do W.")),
        ("X should be Y. Found Z: a b.", ("X should be Y.", "Z: a b", "")),
        ("X should be Y. Found …. Pass `a`. Or b.", ("X should be Y.", "…", "Pass `a`. Or b.")),
        ("X has happened. Do W.", ("X has happened.", "", "Do W.")),
    ],
)
def test_messages_are_split_into_what_was_expected_found_and_is_to_be_done(text, parts):
    assert errors_page.split(text) == parts


def test_addresses_of_messages_differ():
    anchors = re.findall(r'<a id="(.*?)">', errors_page.page())
    assert len(anchors) == len(set(anchors)) > 100


# ---------------------------------------------------------------------- worths


def worths() -> dict[str, dict[str, str]]:
    """The worth of each method on each problem, and as the key "mean" over problems."""
    text = (DOCS / "worth.md").read_text()
    means = text.partition("## All methods")[2].partition("## Settings")[0]
    found = {"mean": dict(re.findall(r"^\| `(.+?)` \| ([\d.]+)", means, re.MULTILINE))}
    for section in text.split("\n### ")[1:]:
        name = re.search(r"^`(\w+)`: losses ", section, re.MULTILINE)[1]
        found[name] = dict(re.findall(r"^\| `(.+?)` \| ([≤≥ \d.]+) \[", section, re.MULTILINE))
    return found


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page on methods."""
    section = (DOCS / "choosing.md").read_text().partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?m)(^\|.*\n)+", section)[0]
    return [
        [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()
    ][2:]


def test_worths_of_tasks_are_those_that_were_measured():
    measured = worths()
    compared = 0
    for _, _, methods, plain, problem, *_ in rows("By task"):
        entries = measured[re.search(r"`(\w+)`", problem)[1]]
        assert plain == entries["Sum"]
        for method, worth in re.findall(r"`([^`]+)` ((?:≥ )?[\d.]+)", methods):
            assert worth == entries[method], (problem, method)
            compared += 1
    assert compared > 30


def test_mean_worths_of_situations_are_those_that_were_measured():
    means = worths()["mean"]
    compared = 0
    for _, methods, *_ in rows("By situation"):
        for method, worth in re.findall(r"`([^`]+)` \(([\d.]+)\)", methods):
            assert float(worth) == pytest.approx(float(means[method]), abs=0.06), method
            compared += 1
    assert compared > 5


# ---------------------------------------------------------------------- other libraries

NAMES = ("a", "b", "c")


def draw_gradients(count: int, seed: int) -> torch.Tensor:
    """Gradients of different lengths, of which the first two conflict."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 6, dtype=torch.float64, generator=generator)
    drawn[1] = 0.7 * drawn[1] - 0.6 * drawn[0]
    assert drawn[0] @ drawn[1] < 0
    return drawn * torch.tensor([2.0, 0.5, 1.0])[:count, None]


def balance(weighting, gradients: torch.Tensor) -> torch.Tensor:
    """The gradient of losses with these gradients, as a method here combines them."""
    point = torch.nn.Parameter(torch.zeros(6, dtype=gradients.dtype))
    optimizer = moo_balance.BalancedOptimizer(torch.optim.SGD([point], lr=1.0), weighting)
    optimizer.backward(dict(zip(NAMES, 1 + gradients @ point, strict=False)))
    return point.grad


def comparisons(section: str) -> list[tuple[str, str, str]]:
    """Rows of a section that name one expression on each side, and how the gradients compare."""
    text = (DOCS / "coming_from.md").read_text().partition(f"\n## {section}\n")[2]
    cells = re.findall(
        r"(?m)^\| `([^`]+)`[^|`]*(?:`[^`]*`)?[^|`]* \| `([^`]+)` \| (.*) \|$",
        text.partition("\n## ")[0],
    )
    return [row for row in cells if row[2].startswith(("the same", "K times"))]


def check_gradients(theirs, ours, relation: str, count: int) -> None:
    if relation.startswith("K times"):
        theirs = count * theirs
    # TorchJD adds constants to gradients, and solves up to a tolerance.
    assert float((ours - theirs).norm()) < 2e-2 * float(theirs.norm())


@pytest.mark.parametrize(("theirs", "ours", "relation"), comparisons("TorchJD"))
def test_gradients_of_torchjd(theirs, ours, relation):
    aggregation = pytest.importorskip("torchjd.aggregation")
    count = 3 if "three" in relation else 2
    gradients = draw_gradients(count, seed=count)
    torch.set_default_dtype(torch.float64)
    try:
        aggregator = eval(theirs, {"torch": torch, **vars(aggregation)})
        expected = aggregator(gradients)
    finally:
        torch.set_default_dtype(torch.float32)
    method = eval(ours, vars(moo_balance).copy())
    check_gradients(expected, balance(method, gradients), relation, count)


@pytest.mark.parametrize(("theirs", "ours", "relation"), comparisons("pytorch-optimizer's PCGrad"))
def test_gradients_of_pytorch_optimizer(theirs, ours, relation):
    peer = pytest.importorskip("pytorch_optimizer")
    gradients = draw_gradients(2, seed=0)
    point = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    plain = torch.optim.SGD([point], lr=1.0)
    state = random.getstate()
    eval(theirs, {**vars(peer), "optimizer": plain}).pc_backward(list(1 + gradients @ point))
    random.setstate(state)
    method = eval(ours, vars(moo_balance).copy())
    check_gradients(point.grad, balance(method, gradients), relation, 2)


@pytest.mark.parametrize(("theirs", "ours", "relation"), comparisons("conflictfree"))
def test_gradients_of_conflictfree(theirs, ours, relation):
    peer = pytest.importorskip("conflictfree.grad_operator")
    gradients = draw_gradients(3, seed=1).float()
    expected = eval(theirs, {**vars(peer), "gradients": gradients})
    check_gradients(expected, balance(eval(ours, vars(moo_balance).copy()), gradients), relation, 3)


def test_rows_about_other_libraries_are_compared():
    sections = ("TorchJD", "pytorch-optimizer's PCGrad", "conflictfree")
    assert [len(comparisons(section)) for section in sections] == [12, 2, 2]


def test_encodec_and_vqgan_are_the_rules_of_their_code():
    """Written out from what their code computes, with the norm over the batch."""
    gradients = draw_gradients(2, seed=2)
    norms = np.linalg.norm(gradients.numpy(), axis=1)
    shares = np.array([1.0, 3.0]) / 4.0
    encodec = moo_balance.GradientNorms.encodec({"a": 1.0, "b": 3.0})
    expected = (shares / norms) @ gradients.numpy()
    np.testing.assert_allclose(balance(encodec, gradients).numpy(), expected, rtol=1e-5)

    vqgan = moo_balance.GradientNorms.vqgan("a", preference={"a": 1.0, "b": 0.8})
    weight = 0.8 * min(norms[0] / (norms[1] + 1e-4), 1e4)
    expected = gradients[0].numpy() + weight * gradients[1].numpy()
    np.testing.assert_allclose(balance(vqgan, gradients).numpy(), expected, rtol=1e-5)


# ---------------------------------------------------------------------- pages in a repository

PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("recipes/*.md"))]
NOT_OURS = {"changelog.md", "coming_from.md", "torchjd.md"}  # names of the past, or of others
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return str(page.relative_to(DOCS.parent))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The addresses that a repository's view and MyST give to headings, and explicit ones."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="(.*?)">', page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_to_files_and_headings_are_not_broken(page):
    for link, anchor in re.findall(r"\]\((?!http)([\w./]*)(?:#([\w-]+))?\)", prose(page)):
        target = page.parent / link if link else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_have_no_roles_and_no_code_from_other_files(page):
    text = page.read_text()
    assert not re.search(r"\{[\w:-]+\}`", text), "name the object as plain code: it becomes a link"
    assert "{literalinclude}" not in text, "copy the code into a block ```py, and link its file"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_that_is_shown_is_that_of_a_file_that_the_page_links(page):
    text = page.read_text()
    files = [page.parent / link for link in re.findall(r"\]\(([\w./]+\.py)\)", text)]
    sources = [file.read_text() for file in files]
    for block in re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert any(block in source for source in sources), block


def test_recipes_are_listed_and_show_code_of_their_scripts():
    index = (DOCS / "recipes" / "index.md").read_text()
    for page in sorted(DOCS.glob("recipes/*.md")):
        if page.stem != "index":
            text = page.read_text()
            assert f"]({page.name})" in index, page
            assert f"(../../examples/recipes/{page.name.replace('.md', '.py')})" in text, page
            assert re.search(r"^```py\n(def|class) ", text, re.MULTILINE), page


def listed(page: str) -> list[str]:
    """The names on a page that have a line with a link to their source."""
    text = (DOCS / page).read_text()
    return re.findall(r"^\| `(\w+)` \|.*\]\(\.\./moo_balance/[\w/]+\.py\) \|$", text, re.MULTILINE)


def test_the_list_of_functions_is_complete():
    assert sorted(listed("functional.md")) == sorted(functional.__all__)


def test_the_lists_of_public_names_are_complete():
    methods = set(moo_balance.weighting.__all__)
    names = [name for name in moo_balance.__all__ if name not in methods]
    assert sorted(listed("optimizer.md") + listed("diagnosis.md")) == sorted(names)


@pytest.mark.parametrize("page", ["functional.md", "optimizer.md", "diagnosis.md"])
def test_a_listed_name_is_in_the_file_that_its_line_links(page):
    text = (DOCS / page).read_text()
    for name, file in re.findall(r"^\| `(\w+)` \|.*\]\((\S+\.py)\) \|$", text, re.MULTILINE):
        assert re.search(rf"^(def|class) {name}\b", (DOCS / file).read_text(), re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_members_of_public_classes_that_are_named_exist(page):
    if page.name in NOT_OURS:
        return
    for name, member in re.findall(r"`(\w+)\.(\w+)(?:\(.*?\))?`", prose(page)):
        if name in moo_balance.__all__:
            found = getattr(moo_balance, name)
            assert hasattr(found, member) or member in found.__annotations__, f"{name}.{member}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_full_names_of_the_package_exist(page):
    for name in re.findall(r"`(moo_balance(?:\.\w+)+)(?:\(.*?\))?`", prose(page)):
        assert page.name in NOT_OURS or pydoc.locate(name) is not None, name


# ---------------------------------------------------------------------- links from code


@pytest.mark.parametrize(
    ("code", "target"),
    [
        ("FAMO", "moo_balance.FAMO"),
        ('FAMO(every=10, logit_optimizer="sgd")', "moo_balance.FAMO"),
        ("FAMO.init", "moo_balance.FAMO.init"),
        ("moo_balance.FAMO", "moo_balance.FAMO"),
        ("rescale", "moo_balance.functional.rescale"),
        ("functional.rescale", "moo_balance.functional.rescale"),
        ("FAMO.other", None),
        ("FAMO, rescale", None),
        ("torch.FAMO", None),
        ("famo", None),
        ("FAMO() or FAMO()", None),
        ("FAMO(every=10), rescale()", None),
        ("FAMO(shift=(1))", "moo_balance.FAMO"),
        ("", None),
    ],
)
def test_code_that_names_a_documented_object_is_found(code, target):
    code_links = pytest.importorskip("docs._ext.code_links")
    documented = ["moo_balance.FAMO", "moo_balance.FAMO.init", "moo_balance.functional.rescale"]
    modules = ["moo_balance", "moo_balance.functional"]
    assert code_links.find_target(code, documented, modules) == target


def test_code_becomes_a_link_in_text_only(tmp_path):
    application = pytest.importorskip("sphinx.application")
    (tmp_path / "conf.py").write_text(
        "extensions = ['docs._ext.code_links']\n"
        "code_links_modules, code_links_exclude = ['package'], ['other']\n"
    )
    text = """
A title with ``method``
=======================

``method(every=2)``, ``unknown``, `a link with code <https://example.org>`_.

.. py:function:: package.method()

   Its ``method`` is its own argument.
"""
    (tmp_path / "index.rst").write_text(text)
    (tmp_path / "other.rst").write_text(
        ":orphan:\n\nOther\n=====\n\n``method`` of another package.\n"
    )
    pages = tmp_path / "html"
    application.Sphinx(tmp_path, tmp_path, pages, tmp_path / "trees", "html", status=None).build()
    link = r'<a class="reference internal" href="#package.method"[^>]*><code[^>]*>(.*?)</code></a>'
    linked = re.findall(link, (pages / "index.html").read_text())
    assert [re.sub("<.*?>", "", code) for code in linked] == ["method(every=2)"]
    assert "#package.method" not in (pages / "other.html").read_text()
