"""The page of `inarch report`: what it says of which records, and that nothing in a record can become a part of it."""

import html.parser
import json
import re
import sys
from dataclasses import replace

import little_records as little
import pytest
from typer.testing import CliRunner

from inarch.cli import app
from inarch.core.errors import StateError
from inarch.core.records import FindingRecord, MonitorRecord, RunRecord, VerdictRecord, read_record
from inarch.report import Entry, read_entries, write_report
from inarch.report.charts import _apart, _side_by_side, charts
from inarch.report.draw import colours
from inarch.report.drawing import grafts
from inarch.report.entries import differing
from inarch.report.page import render


def entries(*records):
    return [
        Entry(number=number, name=f"run-{number}", place=f"runs/{number}", record=record)
        for number, record in enumerate(records, start=1)
    ]


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text outside style, script and drawings."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("style", "script", "svg"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page(*records, **options):
    return Page(render(entries(*records), **options))


def test_the_page_says_how_each_run_did():
    found = page(little.seeds(0.90, 0.94), little.run(0.8, adapter=None, trainable=500), little.unsound())
    assert "The best of 3 runs is run-1 with accuracy 92.0 % ± 2.8 % over 2 seeds" in found.words
    assert "training 1,000 of 100 k parameters" in found.words
    assert "run-2 head only not judged 80.0 % 500 12.5 s finished" in found.words
    assert "unsound 40.0 %" in found.words


def test_the_page_is_one_file_that_asks_for_nothing():
    """No element has an address but anchors of the page itself, and the policy forbids all loading."""
    found = page(little.run(), little.unsound())
    addresses = {
        value
        for tag, attributes in found.elements
        for key, value in attributes.items()
        if key in ("src", "href", "action", "data", "srcset", "poster") and not value.startswith("#")
    }
    assert addresses == {"data:,"}
    policies = [attributes["content"] for _, attributes in found.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"]
    source = render(entries(little.run()))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", source)
    assert len(source.encode()) < 200_000


def hostile():
    """A run with a hostile text wherever a record has one."""
    text = little.HOSTILE
    finding = FindingRecord(code=text, level="error", place=text, message=text, fixes=(text,), advice=text)
    return little.run(
        adapter=text,
        name=text,
        command=("inarch", text),
        model={"class": text, "parameters": 10, "trainable": 5},
        data={"name": text, "labels": [text]},
        job={**little.run().job, "model": text, "recipe": {"learning_rate": text}},
        environment={text: text, "versions": {text: text}},
        sites=little.sites(adapted=text, verdict=text, adapter=text),
        verdict=VerdictRecord(sound=False, details=(finding,)),
        status=text,
        started=text,
    )


def test_no_text_of_a_record_becomes_a_part_of_the_page():
    """The same elements as with harmless texts in the same places, and every text there to read, unchanged."""
    harmless = json.loads(json.dumps(hostile().to_dict()).replace(json.dumps(little.HOSTILE)[1:-1], "harmless"))
    records = [
        [Entry(number=n, name=name, place=name, record=record) for n in (1, 2, 3)]
        for name, record in ((little.HOSTILE, hostile()), ("harmless", RunRecord.from_dict(harmless)))
    ]
    for one in records:  # what differs is a text too
        one[2] = Entry(number=3, name=one[0].name, place="", record=little.run())
    found, expected = (Page(render(one, title=one[0].name)) for one in records)

    def shapes(page):
        drawn = {"path", "g", "line", "wbr"}  # the lengths of texts decide which lines there are
        told = [(tag, one) for tag, one in page.elements if tag not in drawn and one.get("class") != "whole"]
        return [(tag, sorted(attributes)) for tag, attributes in told]

    assert shapes(found) == shapes(expected)
    assert found.words.count("{{ 1 + 1 }}") == expected.words.count("harmless")


def test_a_chart_escapes_what_it_draws():
    svg = charts(entries(hostile(), little.run(), little.run(0.5)))
    for chart in svg:
        for drawing in filter(None, (chart.svg, chart.full)):
            assert "<script" not in drawing and "<b>" not in drawing


def test_findings_are_shown_once_with_their_runs_and_fixes():
    found = page(little.run(), little.unsound(), little.unsound())
    assert found.words.count("skip connection lost; the base model computes") == 1
    assert "runs 2 run-2, 3 run-3" in found.words
    assert "Set residual_before_ln=False or original_ln_after=True" in found.words
    assert ("code", {}) in found.elements  # what stood between backticks


def test_findings_of_older_records_are_shown_as_the_lines_they_are():
    record = little.run(verdict=VerdictRecord(sound=False, findings=("error unsound-wiring at mlp: lost.",)), sites=())
    found = page(record)
    assert "error unsound-wiring at mlp: lost." in found.words
    assert "finding of level error" in found.words
    assert "This record knows of no site: no place for an adapter was found in the model" in found.words
    assert "Point at a site" not in found.words


def test_the_model_is_drawn_layer_by_layer_with_formulas():
    found = page(little.unsound())
    keys = re.findall(r"image0\.\d\.\w+", found.words)
    assert keys == [f"image0.{layer}.{role}" for layer in range(3) for role in ("self_attention", "mlp")]
    assert little.LOST in found.words and "skip connection lost" in found.words
    assert sum(attributes.get("class") == "site lost" for _, attributes in found.elements) == 3


def test_a_site_keeps_its_place_in_the_layer_whatever_is_grafted_where():
    """An attention that is adapted in the last layer only still comes before the MLP."""
    attention, mlp = little.sites()
    last = replace(attention, layers=(2,), modules=mlp.modules)
    first = replace(attention, layers=(0, 1))
    (graft,) = grafts(entries(little.run(sites=(first, mlp, last))))
    assert [[site.record.role for site in layer.sites] for layer in graft.stacks[0].layers] == [
        ["self_attention", "mlp"]
    ] * 3


def test_runs_with_the_same_model_share_a_drawing():
    same = grafts(entries(little.run(), little.run(0.5), little.unsound()))
    assert [[entry.number for entry in graft.entries] for graft in same] == [[1, 2], [3]]


def test_what_differs_is_what_all_have_and_not_all_have_alike():
    one, other = little.run(learning_rate=0.001), little.run(learning_rate=0.01, seed=3)
    assert differing(entries(one, other)) == ["learning_rate"]
    assert differing(entries(one, little.run(reduction=8.0))) == ["reduction_factor"]
    assert differing(entries(one, little.run(adapter=None))) == ["configuration"]
    assert differing(entries(one)) == []


def test_the_charts_that_the_numbers_allow():
    def titles(*records):
        return [chart.title for chart in charts(entries(*records))]

    curves = ["Accuracy on held-out images", "Training loss"]
    assert titles(little.run()) == curves
    assert titles(little.run(), little.run(0.5)) == [*curves, "Accuracy against trained parameters"]
    swept = [little.run(0.5 + n / 10, learning_rate=10.0**-n, reduction=2.0**n) for n in (1, 2, 3)]
    assert titles(*swept) == [*curves, "Accuracy against trained parameters", "Where the runs differ"]
    bare = little.run(epochs=(), results={}, status="running")
    assert titles(bare) == []
    assert "No run has a result yet." in page(bare).words


def test_every_mark_of_a_chart_knows_its_run():
    swept = [little.run(0.5 + n / 10, learning_rate=10.0**-n, reduction=2.0**n) for n in (1, 2, 3)]
    for chart in charts(entries(*swept)):
        for drawing in filter(None, (chart.svg, chart.full)):
            assert set(re.findall(r'data-run="(\d+)"', drawing)) == {"1", "2", "3"}, chart.title
    curve = charts(entries(*swept))[0].svg
    assert 'data-tip="run-2, epoch 3: accuracy 70.0 %"' in curve
    assert "run-2 ends at 70.0 %" in charts(entries(*swept))[0].summary.replace("2 run-2", "run-2")


def test_equal_results_share_a_label():
    same = [little.run(0.9, trainable=1000), little.run(0.9, trainable=1000), little.run(0.5, trainable=1000)]
    against = charts(entries(*same))[2].svg
    assert re.findall(r">([\d, ]+)</text>", against)[-2:] == ["1, 2", "3"]
    assert set(re.findall(r'data-run="(\d+)"', against)) == {"1", "2", "3"}


def test_points_of_one_size_stand_side_by_side_where_they_would_cover_each_other():
    rows = [(10.0, 0.5, 0.5), (10.0, 0.51, 0.51), (10.0, 0.9, 0.9), (20.0, 0.5, 0.5), (10.0, 0.5, 0.5)]
    assert _side_by_side(rows, 0.05) == [-0.5, 0.5, -0.5, 0.0, -0.5]
    close = [little.run(value, trainable=1000) for value in (0.9, 0.901, 0.5)]
    against = charts(entries(*close))[2].svg
    places = re.findall(r'<path data-run="(\d)"[^>]*transform="translate\(([\d.]+),', against)
    assert len(dict(places)) == 3 and dict(places)["1"] != dict(places)["2"]
    assert "those of one size side by side" in against


def test_an_unsound_run_that_learns_is_not_shown_as_if_all_were_well():
    seen = MonitorRecord(verdict="learning", reason="the loss falls")
    lost = replace(little.unsound(), monitor=seen)
    assert '<span class="verdict unsound">unsound</span> <span class="verdict not-judged">learning' in render(
        entries(lost)
    )
    assert '<span class="verdict sound">learning' in render(entries(replace(little.run(), monitor=seen)))


def test_seeds_are_explained_where_there_are_some():
    assert "Thin lines are single seeds." in page(little.seeds(0.9, 0.94)).words
    assert "Thin lines" not in page(little.run()).words


def test_labels_at_the_ends_of_lines_do_not_cover_each_other():
    ends = [(0.90, 1, 3.0), (0.91, 2, 3.0), (0.2, 3, 3.0)]
    placed = {number: place for place, number, _ in _apart(ends, 0.05)}
    assert placed[3] == 0.2
    assert placed[2] - placed[1] == pytest.approx(0.05)
    assert (placed[1] + placed[2]) / 2 == pytest.approx(0.905)


def test_a_record_keeps_sites_and_findings(tmp_path):
    record = little.unsound()
    record.save(tmp_path)
    assert read_record(tmp_path) == record


def test_runs_are_found_in_folders(tmp_path):
    little.save(tmp_path / "a", one=little.run(), two=little.seeds(0.8, 0.9))
    little.save(tmp_path / "a" / "two", **{"seed-0": little.run()})  # a part of the run `two`
    little.save(tmp_path, b=little.run())
    found = read_entries([tmp_path / "b" / "run.json", tmp_path / "a", tmp_path / "a" / "one"])
    assert [entry.name for entry in found] == ["b", "a/one", "a/two"]
    assert [entry.number for entry in found] == [1, 2, 3]
    assert [entry.name for entry in read_entries([tmp_path / "b"])] == ["b"]


def test_a_study_is_shown_as_its_trials(tmp_path):
    little.study().save(tmp_path / "study")
    little.save(tmp_path / "study" / "trials", **{"0000": little.run(0.9)})
    found = read_entries([tmp_path / "study"])
    assert [entry.state for entry in found] == [
        "finished", "finished", "refused by check", "repeated by proof", "pruned by hyperband",
    ]  # fmt: skip
    assert found == read_entries([tmp_path]) == read_entries([tmp_path / "study" / "study.json"])
    shown = Page(render(found)).words
    # The pruned trial is not the best, however well it did before it was ended.
    assert "The best of 5 trials is trial 1 ( seq_bn[reduction_factor=2] ) with accuracy 95.0 % ± 1.0 % over 2" in shown
    assert "They took 60 steps, 40 % of what training all of them to the end takes." in shown
    assert "2 finished, 1 refused by check, 1 repeated by proof, 1 pruned by hyperband" in shown
    assert "trial 2 refused by check: the skip connection is lost" in shown
    assert "Settings of trial 0 to trial 4" in shown
    assert differing(found) == ["learning_rate", "reduction_factor"]
    curve, _, against, parallel = charts(found)
    assert set(re.findall(r'data-run="(\d)"', curve.svg)) == {"0", "1", "4"}
    assert set(re.findall(r'data-run="(\d)"', against.svg)) == {"0", "1", "3"}
    assert set(re.findall(r'data-run="(\d)"', parallel.svg)) == {"0", "1", "3", "4"}
    # A number is that of the trial, and what is trained is the head too.
    assert [entry.number for entry in found] == [trial.number for trial in little.study().trials]
    assert [entry.number_of("trainable") for entry in found] == [100 + 1000 * 2**number for number in range(5)]
    little.save(tmp_path, other=little.run(0.9))
    assert [entry.number for entry in read_entries([tmp_path])] == [1, 2, 3, 4, 5, 6]


def test_a_trial_that_was_not_trained_is_drawn_as_it_was_judged():
    record = little.study()
    lost = replace(record.trials[2], sites=little.sites("y = h + A(x + h)", "skip connection lost"))
    (entry,) = [Entry(number=2, name="trial 2", place="", record=lost, study=record)]
    (graft,) = grafts([entry])
    assert graft.model_class == "ViT"
    shown = Page(render([entry])).words
    assert "y = h + A(x + h)" in shown and "skip connection lost" in shown


def test_a_trial_without_one_of_the_settings_is_shown_without_it():
    trials = little.study().trials
    other = replace(trials[1], number=5, values={"learning_rate": 0.5, "r": 4})
    study = little.study(trials=(*trials, other))
    found = [
        Entry(number=number, name=f"trial {one.number}", place="", record=one, study=study)
        for number, one in enumerate(study.trials, start=1)
    ]
    assert differing(found) == ["learning_rate", "reduction_factor", "r"]
    assert render(found)


def test_what_a_monitor_saw_is_told_of_the_seed_that_was_watched():
    runs = [little.run(0.8, seed=10), little.watched(seed=11)]
    both = replace(little.seeds(0.8, 0.9), runs=tuple(runs))
    assert "run-1, seed 11 stalled at step 15 of 150" in page(both).words


def test_what_a_monitor_saw_is_told():
    assert (
        "1 run-1 stalled at step 15 of 150 the loss stays at 2.3 No gradient reaches image0.1.mlp."
        in page(little.watched()).words
    )
    assert "What was seen" not in page(little.run()).words


def test_of_many_runs_the_better_have_the_stronger_colour():
    many = entries(*(little.run(number / 20) for number in range(1, 11)), little.run(results={}))
    found = colours(many)
    assert [found[number] for number in (1, 2, 3, 9, 10, 11)] == [
        f"var(--level-{level})" for level in (1, 1, 2, 5, 5, 1)
    ]
    assert len(set(colours(many[:8]).values())) == 8
    assert render(many)


def test_a_place_without_runs_is_told(tmp_path):
    (tmp_path / "x.txt").touch()
    for place, words in (
        (tmp_path, "which holds no run"),
        (tmp_path / "y", "there is none"),
        (tmp_path / "x.txt", "a file"),
    ):
        with pytest.raises(StateError, match=rf"A report is of runs; got `.*`, .*{words}\. Name the output folder"):
            read_entries([place])


def test_a_report_is_written_over_a_report_and_nothing_else(tmp_path):
    few = entries(little.run())
    target = write_report(few, tmp_path / "new" / "report.html", title="first")
    assert "second" in write_report(few, target, title="second").read_text()
    assert [entry.name for entry in target.parent.iterdir()] == ["report.html"]
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(
        StateError, match=r"over another report; got `.*mine.html`, which is something else. Name another"
    ):
        write_report(few, tmp_path / "mine.html")
    with pytest.raises(StateError, match=r"written to a file; got the folder `.*`. Name a file in it."):
        write_report(few, tmp_path)
    with pytest.raises(StateError, match=r"The report must be writable; got `.*report.html`: .*. Free some space"):
        write_report(few, tmp_path / "mine.html" / "report.html")
    with pytest.raises(StateError, match=r"at least one run; got none"):
        write_report([], tmp_path / "none.html")


def test_the_command_writes_beside_the_record(tmp_path):
    little.save(tmp_path, one=little.run(), two=little.unsound())
    done = CliRunner().invoke(app, ["report", str(tmp_path / "one")])
    assert done.exit_code == 0
    assert re.fullmatch(r"Wrote .*/one/report\.html: 1 run, \d+ kB\n", done.output)
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(tmp_path / "all.html"), "--title", "Both"])
    assert done.exit_code == 0
    assert "<h1>Both</h1>" in (tmp_path / "all.html").read_text()
    assert CliRunner().invoke(app, ["report"]).exit_code == 2
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: A report is of runs; got")


def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    little.save(tmp_path, one=little.run())
    for name in [name for name in sys.modules if name.startswith("inarch.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "one")])
    assert done.exit_code == 1
    assert "A report needs the optional package `vl_convert`; got" in done.stderr
    assert 'Install it with `pip install "inarch[report]"`.' in done.stderr
