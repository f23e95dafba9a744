"""The report says what the run files say."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from gfml.base.runs import checksums, read_result
from gfml.metrics.compare import bootstrap_mean
from gfml.report import page as report
from gfml.report.ranking_page import write_report
from gfml.report.recommenders import GLOSSARY, TABLE_METRICS
from recsys.report import main

PLOTS = {"learning.png", "groups.png", "mass.png", "mass-curve.png"}


@pytest.fixture
def words_only(monkeypatch):
    """Plots are made but not painted, which takes most of the time."""
    monkeypatch.setattr(report, "png", lambda figure: b"picture of " + str(len(figure.axes)).encode())


@pytest.fixture
def copy(finished, tmp_path):
    """copy(name, change): a copy of a finished run whose result ``change`` has edited."""

    def make(name, change=lambda result: None, to=None):
        path = tmp_path / (to or name)
        shutil.copytree(finished[name], path)
        result = read_result(path)
        change(result)
        (path / "result.json").write_text(json.dumps(result))
        told = (path / "done").read_text().split()[:2]
        (path / "done").write_text(" ".join([*told, *checksums(path)]))
        return path

    return make


class Text(HTMLParser):
    """The words of a page, blocks on lines of their own, and its tables as lists of rows of cells."""

    def __init__(self, path):
        super().__init__()
        self.words, self.tables, self.skip, self.cell = [], [], False, False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"[ \t]+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.skip = tag == "style"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True
        self.words.append("\n" if tag in ("p", "dt", "dd", "h1", "h2", "td", "tr") else " ")
        if tag == "small":
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.skip:
            return
        self.words.append(data)
        if self.cell:
            self.tables[-1][-1][-1] += data


def read(runs, out):
    return Text(write_report(runs, out))


@pytest.fixture(scope="module")
def gravity(finished, tmp_path_factory):
    """The report of the run called gravity: (page, folder, stored result)."""
    folder = tmp_path_factory.mktemp("report")
    return read([finished["gravity"]], folder), folder, read_result(finished["gravity"])


def test_one_run(gravity):
    page, folder, result = gravity
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", *PLOTS}
    assert all(path.stat().st_size > 1000 for path in folder.iterdir())
    data = result["data"]
    for part in ("train", "test"):
        assert f"{part} {data[part]:,}" in page.text
    for words in (
        "60 users × 40 items",
        "selected on validation",
        "ndcg@10 on validation",
        f"epoch {result['selection']['epoch']} of 6",
    ):
        assert words in page.text
    assert "\n2020\n" not in page.text and "\n7\n" in page.text, "the seed"


def test_the_metrics_table(finished, gravity):
    page, _, result = gravity
    header, *rows = page.tables[0]
    assert header[1:5] == ["recall@5", "recall@10", "ndcg@5", "ndcg@10"]
    assert [row[0] for row in rows] == ["mf gravity", "popularity", "item-knn"]
    stored = np.load(finished["gravity"] / "analysis.npz")
    for name, cell in list(zip(header, rows[0], strict=True))[1:]:
        assert cell.startswith(
            f"{result['test'][name]:.4f}" if result["test"][name] < 10 else f"{result['test'][name]:,.1f}"
        )
        if name in ("recall@5", "ndcg@10", "tail_recall@10"):
            interval = bootstrap_mean(stored[f"per_user/{name}"], resamples=1000)
            assert interval.low < result["test"][name] < interval.high
            assert cell.endswith(f"{interval.low:.4f}–{interval.high:.4f}")
    column = header.index("ndcg@10")
    assert rows[1][column] == f"{result['baselines']['popularity']['test']['ndcg@10']:.4f}"


def differences_of(page):
    """The table of paired differences; a wide one before it may be cut in two."""
    return next(table for table in page.tables if table[0][0].startswith("minus "))


@pytest.mark.usefixtures("words_only")
def test_several_runs(finished, tmp_path):
    runs = [finished[name] for name in ("gravity", "bpr", "mix")]
    page = read(runs, tmp_path)
    overview, metrics, differences = *page.tables[:2], differences_of(page)
    labels = ["mf gravity", "mf bpr", "mf mix"]
    assert [row[0] for row in overview[1:]] == labels and [row[0] for row in metrics[1:4]] == labels
    assert differences[0] == ["minus mf gravity", "recall@5", "recall@10", "ndcg@5", "ndcg@10"]
    assert [row[0] for row in differences[1:]] == labels[1:]
    first, second = (np.load(run / "analysis.npz")["per_user/ndcg@10"].astype(float) for run in runs[:2])
    cell = differences[1][4]
    assert cell.startswith(f"{(second - first).mean():+.4f}".replace("-", "−"))
    p = stats.wilcoxon(second - first, zero_method="wilcox").pvalue
    assert cell.endswith("p < 0.001" if p < 0.001 else f"p = {p:.3f}")
    assert {path.name for path in tmp_path.iterdir()} >= PLOTS


@pytest.mark.usefixtures("words_only")
def test_other_users_are_not_paired(finished, copy, tmp_path):
    other = copy("bpr")
    arrays = dict(np.load(other / "analysis.npz"))
    np.savez(other / "analysis.npz", **{**arrays, "test_users": arrays["test_users"] + 1})
    page = read([finished["gravity"], other], tmp_path / "out")
    assert differences_of(page)[1][1].startswith("– other users judged")


@pytest.mark.usefixtures("words_only")
def test_another_test_part_is_not_paired(finished, copy, tmp_path):
    other = copy("bpr", lambda result: result["data"].update(test_fingerprint="other", fingerprint="other"))
    page = read([finished["gravity"], other], tmp_path / "out")
    assert differences_of(page)[1][1] == "– another split of synthetic, so another test part"
    assert "did not all see the same" in page.text


@pytest.mark.usefixtures("words_only")
def test_data_sets_get_tables_of_their_own(finished, copy, tmp_path):
    other = copy("bpr", lambda result: result["data"].update(name="second"))
    page = read([finished["gravity"], other], tmp_path / "out")
    assert "Metrics on synthetic" in page.text and "Metrics on second" in page.text
    assert "minus" not in page.text
    assert {"groups-synthetic.png", "groups-second.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.usefixtures("words_only")
def test_selection_on_test_is_a_warning(finished, tmp_path):
    write_report([finished["lgn"], finished["gravity"]], tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    warnings = re.findall(r'<p class="note warning">(.*?)</p>', text)
    assert len([line for line in warnings if "selected on the reported test part" in line]) == 1
    assert warnings[0].startswith("lgn bpr_gra: ") and "optimistic" in warnings[0]
    assert "ndcg@10 on TEST" in text
    assert "> **Warning:** lgn bpr" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [(0.91, "good", "is recovered: Spearman 0.910"), (0.42, "warning", "is not recovered: Spearman 0.420")],
)
def test_it_says_whether_the_true_mass_is_recovered(copy, tmp_path, value, kind, words):
    run = copy("gravity", lambda result: result["mass"].update(item_spearman_true=value))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f'<p class="note {kind}">The true item mass {words}' in text


def test_popularity_groups(gravity):
    page, _, result = gravity
    test = result["test"]
    rows = {row[0]: row[1:] for row in next(table for table in page.tables if table[1][0] == "train interactions")}
    assert rows["recall, mf gravity"] == [f"{test[f'q{g}_recall@10']:.1%}" for g in range(1, 6)]
    assert rows["slots, mf gravity"] == [f"{test[f'q{g}_exposure@10']:.1%}" for g in range(1, 6)]
    assert rows["train interactions"] == [f"{test[f'q{g}_train_share']:.1%}" for g in range(1, 6)]


@pytest.mark.usefixtures("words_only")
def test_the_mass_table(finished, tmp_path):
    page, mass = read([finished["mix"]], tmp_path), read_result(finished["mix"])["mass"]
    header, row = next(table for table in page.tables if "dead item masses" in table[0])
    assert row[header.index("item mass ~ true mass")] == f"{mass['item_spearman_true']:.3f}".replace("-", "−")
    assert row[header.index("dead item masses")] == f"{mass['item_dead']:.3f}"


@pytest.mark.usefixtures("words_only")
def test_a_run_without_masses(finished, tmp_path):
    page = read([finished["bpr"]], tmp_path)
    assert "No item mass takes part" in page.text and "recovered" not in page.text
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "learning.png", "groups.png"}


@pytest.mark.usefixtures("words_only")
def test_a_run_with_user_masses_only(train, tmp_path):
    run = train(tmp_path, "user", "--mass_mode", "user")
    page = read([run], tmp_path / "out")
    assert "No item mass takes part" in page.text
    assert any("user mass ~ activity" in table[0] for table in page.tables)


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--topks 3",
        "--dist_mode kl --model cml",
        "--refit",
        "--mass_init xavier --mass_param relu --epochs 1",
    ],
)
def test_unusual_runs(train, tmp_path, flags):
    run = train(tmp_path, "run", *flags.split(), "--report", "1")
    assert (run / "report" / "report.html").stat().st_size > 50_000
    assert (
        f"{read_result(run)['test']['recall@10']:.4f}" in (run / "report" / "report.md").read_text()
        or flags == "--topks 3"
    )


def test_every_column_is_explained(gravity):
    page, _, _ = gravity
    assert GLOSSARY.keys() >= {*TABLE_METRICS}
    for name in {column.partition("@")[0] for column in page.tables[0][0][1:]}:
        assert f"\n{name}@K\n{GLOSSARY[name]}" in page.text


@pytest.mark.usefixtures("words_only")
def test_labels_tell_runs_of_one_kind_apart(finished, train, tmp_path):
    other = train(tmp_path, "other", "--epochs", "6", "--lr", "1e-3", "--baselines", "popularity", "item-knn")
    page = read([finished["gravity"], other], tmp_path / "out")
    assert [row[0] for row in page.tables[1][1:3]] == ["mf gravity (lr 0.02)", "mf gravity (lr 0.001)"]


@pytest.mark.usefixtures("words_only")
def test_runs_that_differ_in_nothing_are_numbered(finished, copy, tmp_path):
    page = read([finished["bpr"], copy("bpr")], tmp_path / "out")
    assert [row[0] for row in page.tables[1][1:3]] == ["mf bpr #1", "mf bpr #2"]


@pytest.mark.usefixtures("words_only")
def test_text_of_a_run_is_escaped(copy, tmp_path):
    nasty = "<script>alert(1)</script>"

    def change(result):
        result["model"] = result["data"]["name"] = nasty
        result["data"]["notes"] = {nasty: nasty}
        result["baselines"][nasty] = {"skipped": nasty}

    run = copy("gravity", change)
    facts = json.loads((run / "run.json").read_text())
    facts["sessions"][0]["command"] = nasty
    (run / "run.json").write_text(json.dumps(facts))
    for runs in ([run], [run, copy("bpr", change)]):
        page = write_report(runs, tmp_path / "out").read_text(encoding="utf-8")
        assert nasty not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_it_is_quick(finished, tmp_path):
    started = time.process_time()
    write_report([finished["gravity"]], tmp_path)
    assert time.process_time() - started < 10


# -- the program


def test_the_program_writes_beside_the_run(copy, tmp_path, capsys):
    run = copy("gravity")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.html")
    assert {path.name for path in (run / "report").iterdir()} == {"report.html", "report.md", *PLOTS}


@pytest.mark.usefixtures("words_only")
def test_the_program_writes_one_form(finished, tmp_path):
    assert main([str(finished["gravity"]), "--out", str(tmp_path / "md"), "--format", "md"]) == 0
    assert {path.name for path in (tmp_path / "md").iterdir()} == {"report.md", *PLOTS}


@pytest.mark.usefixtures("words_only")
def test_several_runs_are_reported_beside_them(copy, tmp_path):
    """Every pair has a place of its own."""
    pairs = [(copy("gravity"), copy("bpr")), (copy("gravity", to="third"), copy("bpr", to="fourth"))]
    for pair in pairs:
        assert main([str(path) for path in pair]) == 0
    for name in ("report-gravity-bpr", "report-third-fourth"):
        assert (tmp_path / name / "report.html").exists()


def test_it_runs_from_another_directory(run_script, finished, tmp_path):
    done = run_script("recsys/report.py", str(finished["bpr"]), "--out", "here", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "here" / "report.html").exists(), done.stderr


@pytest.mark.usefixtures("words_only")
def test_bad_runs(fail, finished, copy, tmp_path):
    good = str(finished["bpr"])
    assert "there is no run" in fail(main, str(tmp_path / "nowhere"))
    assert "twice" in fail(main, good, good)
    unfinished = copy("bpr", to="unfinished")
    (unfinished / "done").unlink()
    assert "not finished (incomplete)" in fail(main, str(unfinished))
    damaged = copy("bpr", to="damaged")
    (damaged / "analysis.npz").write_bytes(b"PK")
    assert "analysis.npz" in fail(main, str(damaged))
    foreign = copy("bpr", lambda result: result.pop("topks"), to="foreign")
    assert "no run of a recommender" in fail(main, str(foreign))
    assert "'pdf'" in fail(main, good, "--format", "pdf")
    (tmp_path / "file").write_text("")
    assert "cannot write" in fail(main, good, "--out", str(tmp_path / "file" / "out"))
