"""A history as a table, a file and a figure."""

from __future__ import annotations

import dataclasses
import math
import sys
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, strategies as st
from matplotlib import pyplot as plt

from moo_balance import BalanceValueError, History, StepMetrics
from tests.support.gradients import property_test
from tests.support.problems import snapshot

FIELDS = [field.name for field in dataclasses.fields(StepMetrics)]


def step(names, seed=0, dtype=torch.float32, gramian=True, **others):
    generator = torch.Generator().manual_seed(seed)
    count = len(names)
    rows = torch.randn(count, count + 3, generator=generator).to(dtype)
    vectors = rows.abs()[:, :3].unbind(1)
    return StepMetrics(tuple(names), rows @ rows.T if gramian else None, *vectors, **others)


def history_of(steps, maxlen=None):
    history = History(maxlen)
    for each in steps:
        history.append(each)
    return history


def of_losses(*values, name="a"):
    return history_of(StepMetrics((name,), None, torch.tensor([value])) for value in values)


def mixed():
    """Steps of several kinds and types, of which a history of at most 8 has dropped the first."""
    nan = torch.tensor([math.nan, 1.0])
    return history_of(
        [
            step("ab"),
            step("abc", 1, torch.float64),
            step("ab", 2, torch.bfloat16, gramian=False),
            StepMetrics(("a", "b"), None, nan),
            step("b", 7),
            step("ba", 3, _satisfied=torch.tensor([True, False])),
            step("abc", 4, torch.float64, projected=torch.tensor(0.25)),
            step(("$x", "_y", "a,b"), 5),
            step("c", 6),
        ],
        maxlen=8,
    )


def values(metrics):
    return {name: getattr(metrics, name) for name in FIELDS}


# ---------------------------------------------------------------------- values


def naive_improvement(losses, window):
    means = []
    for start in range(0, len(losses) - window + 1, window):
        finite = [x for x in losses[start : start + window] if math.isfinite(x)]
        if finite:
            means.append((start + window - 1, sum(finite) / len(finite)))
    pairs = pairwise(means)
    return [(t, (old - new) / abs(old)) for (_, old), (t, new) in pairs if old != 0]


@property_test
@given(
    st.lists(st.sampled_from([1.0, 0.5, 3.0, 0.0, -2.0, math.nan, math.inf]), max_size=12),
    st.integers(1, 4),
)
def test_the_improvement_is_the_relative_decrease_between_means(losses, window):
    steps, found = of_losses(*losses).improvement("a", window)
    expected = naive_improvement(losses, window)
    assert steps == [t for t, _ in expected]
    assert found == pytest.approx([value for _, value in expected], rel=1e-12)


def test_the_improvement_is_exact_and_leaves_out_steps_without_the_loss():
    a, b = (StepMetrics((n,), None, torch.tensor([1.0], dtype=torch.float64)) for n in "ab")
    later = dataclasses.replace(a, _losses=torch.tensor([1.0 - 2**-40], dtype=torch.float64))
    assert history_of([a, b, later]).improvement("a") == ([2], [2**-40])
    assert history_of([a, b, later], maxlen=2).improvement("a") == ([], [])
    assert History().improvement("a") == ([], [])
    with pytest.raises(BalanceValueError, match=r"`name` should be one of 'a', 'b'\. Found 'c'"):
        history_of([a, b]).improvement("c")
    for window in (0, 1.0, True):
        with pytest.raises(BalanceValueError, match=f"`window`.*Found {window}"):
            history_of([a]).improvement("a", window)


@pytest.mark.parametrize("pairs", [None, True, False])
def test_a_data_frame_has_each_value_of_each_step(pairs):
    pytest.importorskip("pandas")
    history = mixed()
    frame = history.to_pandas(pairs)
    assert frame.index.name == "step"
    assert list(frame.index) == list(range(1, 9))
    assert list(frame.columns) == history.keys(pairs)
    for row, metrics in zip(frame.to_dict("records"), history._steps, strict=True):
        expected = {key: value.item() for key, value in metrics.as_dict(pairs).items()}
        for key, value in row.items():
            assert value == pytest.approx(expected.get(key, math.nan), rel=0, abs=0, nan_ok=True)
    assert History().to_pandas().empty


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_pandas"), ("matplotlib", "figure")])
def test_a_missing_package_is_named(monkeypatch, package, method):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"History.{method} needs {package}.*pip install"):
        getattr(mixed(), method)()


def test_notebooks_show_a_small_table():
    history = history_of([step(["<b>", *map(str, range(11))], seed) for seed in range(3)])
    shown = history._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert "and 4 more losses" in shown
    last = history._steps[-1]
    assert f"<td>{last.losses['<b>'].item():.4g}</td>" in shown
    assert shown.count("<tr>") == 9
    assert History()._repr_html_() == "<p>History(0 steps)</p>"


# ---------------------------------------------------------------------- files


def test_a_file_keeps_each_step_exactly(tmp_path):
    history = mixed()
    history.save(tmp_path / "run")
    loaded = History.load(tmp_path / "run")
    assert repr(loaded) == repr(history)
    for one, other in zip(history._steps, loaded._steps, strict=True):
        assert snapshot(values(one)) == snapshot(values(other))
    assert repr(loaded.series("loss/a")) == repr(history.series("loss/a"))
    for each in (history, loaded):
        each.append(step("ab", 9))
    assert loaded.series("loss/b") == history.series("loss/b")
    loaded.save(str(tmp_path / "again"))
    assert History.load(tmp_path / "again").series("loss/b") == history.series("loss/b")


def test_an_empty_history_has_a_file(tmp_path):
    History(3).save(tmp_path / "run")
    assert repr(History.load(tmp_path / "run")) == "History(0 steps, maxlen=3)"


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    mixed().save(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        mixed().save(tmp_path / "none" / "run")
    with pytest.raises(IsADirectoryError):
        mixed().save(tmp_path)
    with pytest.raises(TypeError):
        mixed().save(3)


def test_a_file_with_a_step_from_before_the_first_is_read(tmp_path):
    """As they could be written before `append` refused them."""
    history = history_of([step("ab")])
    history._steps.appendleft(StepMetrics())
    history._appended += 1
    history.save(tmp_path / "run")
    loaded = History.load(tmp_path / "run")
    assert loaded.series("loss/a") == history.series("loss/a")
    assert loaded.series("loss/a")[0] == [1]
    loaded.figure().savefig(tmp_path / "run.png", dpi=40)
    assert "<th>a</th>" in loaded._repr_html_()


def damages():
    def change(path, value):
        def damage(content):
            *parents, last = path
            for key in parents:
                content = content[key]
            content[last] = value

        return damage

    group = ("groups", 0)
    return {
        "format": change(("format",), "other"),
        "version": change(("version",), 2),
        "no groups": lambda content: content.pop("groups"),
        "groups": change(("groups",), 3),
        "maxlen": change(("maxlen",), 1),
        "maxlen type": change(("maxlen",), True),
        "appended": change(("appended",), 1),
        "a step is missing": lambda content: content["groups"].pop(0),
        "a step twice": lambda content: content["groups"].append(content["groups"][0]),
        "positions": change((*group, "positions"), torch.tensor([0.5])),
        "names": change((*group, "names"), ["a", 1, "c"]),
        "equal names": change((*group, "names"), ["a", "a", "c"]),
        "too few names": change((*group, "names"), ["a"]),
        "unknown kind": change((*group, "values", "other"), torch.zeros(1)),
        "shape": change((*group, "values", "_losses"), torch.zeros(1, 4)),
        "dtype": change((*group, "values", "_losses"), torch.zeros(1, 3, dtype=torch.int64)),
        "mask": change((*group, "values", "_satisfied"), torch.zeros(1, 3)),
        "no tensor": change((*group, "values", "_losses"), [1.0]),
    }


@pytest.mark.parametrize("damage", damages().values(), ids=damages())
def test_a_damaged_file_is_refused(tmp_path, damage):
    mixed().save(tmp_path / "run")
    content = torch.load(tmp_path / "run", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "run")
    with pytest.raises(BalanceValueError, match=r"`path` should name a file .*Found another"):
        History.load(tmp_path / "run")


def test_what_is_no_file_of_a_history_is_refused(tmp_path):
    mixed().save(tmp_path / "run")
    whole = (tmp_path / "run").read_bytes()
    for content in (b"", b"step,loss\n", whole[: len(whole) // 2]):
        (tmp_path / "run").write_bytes(content)
        with pytest.raises(BalanceValueError, match=r"`path` .*Found a file that torch\.load"):
            History.load(tmp_path / "run")
    for content in (torch.zeros(3), [1], {"format": "moo_balance.History"}):
        torch.save(content, tmp_path / "run")
        with pytest.raises(BalanceValueError, match=r"`path` .*Found another content"):
            History.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "none")


# ---------------------------------------------------------------------- figures


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


@pytest.mark.parametrize(
    ("count", "steps"), [(1, 1), (2, 3), (3, 200), (5, 12), (8, 30), (9, 1), (50, 100)]
)
def test_a_figure_is_drawn_of_any_number_of_losses_and_steps(count, steps, tmp_path):
    names = [f"loss {k}" for k in range(count)]
    history = history_of(step(names, seed) for seed in range(steps))
    open_figures = plt.get_fignums()
    figure = history.figure()
    figure.savefig(tmp_path / "run.png", dpi=40)
    assert plt.get_fignums() == open_figures
    expected = {"loss", "weight", "coefficient"}
    expected |= {"cosine"} if count > 1 else set()
    expected |= {"relative improvement"} if steps > 1 else set()
    assert {title.partition(" in ")[0] for title in titles(figure)} == expected
    losses = figure.axes[0]
    assert losses.get_yscale() == "log"
    assert len(losses.lines) == (1 if count > 8 else 2 * count if steps >= 80 else count)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == (names if count <= 8 else [f"all {count} losses", "middle half", "median"])


def lines_of_cosines(history):
    """By label; lines of single steps in the background have an alpha."""
    (axes,) = [ax for ax in history.figure().axes if ax.get_title(loc="left") == "cosine"]
    *lines, _ = [line for line in axes.lines if line.get_alpha() is None]  # the last is at 0
    legend = axes.get_legend()
    labels = [""] if legend is None else [text.get_text() for text in legend.get_texts()]
    return dict(zip(labels, lines, strict=True))


def colours_of_losses(figure):
    legend = figure.legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    lines = legend.get_lines()
    return {name: line.get_color() for name, line in zip(names, lines, strict=True)}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_line_of_a_pair_has_the_colours_of_both_losses(count):
    history = history_of(step("abcd"[:count], seed) for seed in range(3))
    colours = colours_of_losses(history.figure())
    lines = lines_of_cosines(history)
    pairs = [f"{a},{b}" for a, b in combinations("abcd"[:count], 2)]
    pairs = [""] if count == 2 else pairs
    for label, (a, b) in zip(pairs, combinations("abcd"[:count], 2), strict=True):
        assert (lines[label].get_color(), lines[label].get_gapcolor()) == (colours[a], colours[b])
        assert lines[label].is_dashed()
    others = [line for label, line in lines.items() if label not in pairs]
    assert len(others) == (0 if count == 2 else 2)
    assert not {line.get_color() for line in others} & set(colours.values())


def test_the_cosines_of_many_losses_have_no_colour_of_a_loss():
    history = history_of(step("abcde", seed) for seed in range(3))
    lines = lines_of_cosines(history)
    assert list(lines) == ["min", "mean", "alignment", "alignment if perpendicular"]
    colours = set(colours_of_losses(history.figure()).values())
    assert not {line.get_color() for line in lines.values()} & colours
    styles = {(line.get_linestyle(), line.get_linewidth()) for line in lines.values()}
    assert len(styles) == 4


@pytest.mark.parametrize("count", [3, 5, 12])
def test_a_figure_has_the_alignment_of_perpendicular_gradients(count):
    """The level is that of a Gramian without products."""
    names = [f"loss {k}" for k in range(count)]
    ones = torch.ones(count)
    metrics = StepMetrics(tuple(names), torch.diag(torch.arange(1.0, count + 1)), ones, ones, ones)
    lines = lines_of_cosines(history_of([metrics] * 100))
    alignment, level = lines["alignment"], lines["alignment if perpendicular"]
    assert list(level.get_xdata()) == list(alignment.get_xdata())
    assert level.get_ydata() == pytest.approx([2 / count - 1] * 50)
    assert level.get_ydata() == pytest.approx(alignment.get_ydata(), abs=1e-6)
    assert level.get_linewidth() < alignment.get_linewidth()


def test_the_level_follows_the_number_of_losses_that_are_present():
    steps = [step("abcd"), step("abc"), step("a"), step("ab"), step("abcd", gramian=False)]
    assert list(lines_of_cosines(history_of(steps[1::-1])))[-2:] == [
        "alignment",
        "alignment if perpendicular",
    ]
    level = lines_of_cosines(history_of(steps))["alignment if perpendicular"]
    assert list(level.get_xdata()) == [0, 1, 3]
    assert level.get_ydata() == pytest.approx([-1 / 2, -1 / 3, 0.0])


def test_a_figure_leaves_out_what_is_absent_or_not_finite(tmp_path):
    history = mixed()
    figure = history.figure()
    figure.savefig(tmp_path / "run.png", dpi=40)
    by_name = dict(zip(history._loss_names(), figure.axes[0].lines, strict=True))
    for name, line in by_name.items():
        steps, losses = history.series(f"loss/{name}")
        finite = [(t, x) for t, x in zip(steps, losses, strict=True) if math.isfinite(x)]
        assert list(zip(*line.get_data(), strict=True)) == finite
    of_losses(math.nan, math.inf).figure().savefig(tmp_path / "run.png", dpi=40)


def test_a_figure_of_losses_that_are_not_positive_is_linear_and_equal_weights_are_one_panel():
    vector = torch.tensor([-1.0, 2.0])
    figure = history_of([StepMetrics(("a", "b"), None, vector, vector, vector)] * 2).figure()
    assert titles(figure) == ["loss", "relative improvement in one step", "weight = coefficient"]
    assert figure.axes[0].get_yscale() == "linear"


def test_the_lines_of_a_long_run_are_means_over_windows():
    history = of_losses(*[1.0, 3.0] * 80)
    single, mean = history.figure().axes[0].lines
    assert list(single.get_ydata()) == [1.0, 3.0] * 80
    assert list(mean.get_ydata()) == [2.0] * 40
    assert list(mean.get_xdata())[:2] == [1.5, 5.5]


def test_an_empty_history_has_no_figure():
    with pytest.raises(BalanceValueError, match="at least one step with losses"):
        History().figure()


def test_the_legend_of_a_plot_has_each_name_as_it_is(tmp_path):
    """Matplotlib leaves labels with an underscore out, and reads dollar signs as mathematics."""
    plt.switch_backend("Agg")
    names = ("_y", "$\\no{$", "a,b", "_child_a")
    axes = plt.figure().add_subplot()
    axes.plot([0, 1], [0, 1], label="mine")
    history = history_of([step(names)] * 2)
    for count, kind in enumerate(("weight", "coefficient"), 1):
        history.plot(kind, ax=axes)
        axes.figure.savefig(tmp_path / "run.png", dpi=40)
        shown = [text.get_text().replace(r"\$", "$") for text in axes.get_legend().get_texts()]
        assert shown == ["mine", *names * count]
    plt.close(axes.figure)


def test_the_improvement_has_a_plot():
    plt.switch_backend("Agg")
    axes = of_losses(4.0, 2.0, 1.0).plot("improvement")
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [0.5, 0.5]
    assert axes.get_ylabel() == "relative improvement in one step"
    plt.close(axes.figure)
