"""The pages as a whole: what stands on them, what they say where something is missing, what they let through."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwerk.errors import ConfigError, IntegrityError, ResourceError
from graftwerk.reporting import numbers
from graftwerk.reporting.html import write_report
from tests.reporting import examples
from tests.reporting.reading import Page

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(2)"> ' " & \\ \u202e ]]> --> </style><!--"""


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def comparison(folder: Path, **changes: Any) -> Page:
    return page_of(examples.write_comparison(folder, {**examples.comparison(), **changes}))


@pytest.fixture(params=["run", "comparison"])
def html(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "folder"
    if request.param == "run":
        examples.write_run(folder, analysis_=examples.analysis(), explanation_=examples.explanation())
    else:
        more = {**examples.tuned(), **examples.ablated()}
        examples.write_comparison(folder, {**examples.comparison(), **more})
    return write_report(folder).read_text(encoding="utf-8")


# -- what holds for every page --------------------------------------------------


def test_page_policy_allows_only_own_style_and_script(html: str) -> None:
    page = Page(html)
    (meta,) = [m for m in page.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy"]
    policy = dict(part.split(" ", 1) for part in (meta.attributes["content"] or "").split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["base-uri"] == policy["form-action"] == "'none'"
    for kind in ("style", "script"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    before = html[: html.index("Content-Security-Policy")]
    assert "<style" not in before
    assert "<script" not in before


def test_page_fetches_nothing_and_has_no_inline_handlers(html: str) -> None:
    page = Page(html)
    names = {element.name for element in page.elements}
    assert not names & {"img", "link", "iframe", "object", "embed", "form", "base", "video", "audio", "image"}
    for element in page.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            assert name not in {"style", "src", "srcset", "xlink:href", "srcdoc", "formaction"}
            if name == "href":
                assert (value or "").startswith("#" if element.name == "use" else "./")
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import", re.sub(r"pkg://[^<\"]*|^ *//.*$", "", html, flags=re.MULTILINE)
    )


def test_page_is_well_formed_and_accessible(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.one("html").attributes["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    identifiers = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(identifiers) == len(set(identifiers))
    assert [e for e in page.all("meta") if e.attributes.get("name") == "viewport"]
    for chart in page.all("svg"):
        assert chart.attributes.get("aria-label")
    style = page.one("style").text
    for media in ("prefers-color-scheme: dark", "@media print", "max-width: 640px"):
        assert media in style


def test_page_tables_have_equal_row_lengths(html: str) -> None:
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd][ >]", row)) for row in rows}) == 1


# -- a comparison --------------------------------------------------


def test_comparison_page_opens_with_result(tmp_path: Path) -> None:
    page = comparison(tmp_path)
    assert page.one("h1").text == (
        "Take lora: it is not shown to be worse than full, the best mean, "
        "at 1.5\N{NARROW NO-BREAK SPACE}% of its trained parameters"
    )
    assert "Why lora: −0.5 points against full" in page.one("header").text
    assert "500 test rows, mean over 3 seeds" in page.one("header").text
    headings = [h.text for h in page.all("h2")]
    assert headings == [
        "Quality against cost",
        "All results",
        "What the differences are worth",
        "Every run",
        "The data",
        "How it was measured",
        "Repeat it",
    ]
    assert page.all("pre")[-1].text == examples.comparison()["command"]


def test_comparison_page_tradeoff_switches_between_all_costs(tmp_path: Path) -> None:
    page = comparison(tmp_path)
    radios = [e for e in page.all("input") if e.attributes["type"] == "radio"]
    assert [e.attributes["value"] for e in radios] == [
        "trained_parameters",
        "training_seconds",
        "peak_memory_bytes",
        "latency_ms_batch_1",
        "latency_ms_batch_32",
        "adapter_bytes",
    ]
    assert len([e for e in radios if "checked" in e.attributes]) == 1
    assert [e.attributes["for"] for e in page.all("label")] == [e.attributes["id"] for e in radios]
    points = [e for e in page.all("g", "point") if "data-tip" in e.attributes]
    assert len(points) == len(radios) * 2 * len(examples.METHODS)
    for point in points:
        assert point.attributes["tabindex"] == "0"
        tip = point.attributes["data-tip"] or ""
        for figure in ("Accuracy\t", "Interval\t", "Training time\t", "Peak memory\t", "Adapter size\t"):
            assert figure in tip
        assert point.attributes["aria-label"] == tip.replace("\t", ": ").replace("\n", "; ")
    assert len(page.all("path", "front")) == len(radios) * 2


def test_comparison_page_shows_every_seed_and_pair(tmp_path: Path) -> None:
    page = comparison(tmp_path)
    assert len(page.all("circle", "seed")) == 3 * len(examples.METHODS)
    pairs = [row for row in page.all("tr") if " against " in row.text and ("shown" in str(row.attributes))]
    assert len(pairs) == 21
    verdicts = [e.text for e in page.all("td", "verdict")]
    assert "full is better" in verdicts
    assert "no difference shown" in verdicts
    assert not [text for text in verdicts if "worse" in text]


def test_comparison_page_shows_how_settings_were_found(tmp_path: Path) -> None:
    page = comparison(tmp_path, **examples.tuned())
    assert "How the settings were found" in page.text
    assert "Each could spend 3 trials, with seed 3, which no result has." in page.text
    assert page.text.count("learning_rate 0.003, r 16chosen") == 2
    assert "What each method spent" in page.text
    assert "How the settings were found" not in comparison(tmp_path / "plain").text
    timed = {**examples.tuned()["budget"], "trials": None, "seconds": 600.0}
    assert (
        f"Each could spend 10{numbers.THIN}min"
        in comparison(tmp_path / "timed", **examples.tuned() | {"budget": timed}).text
    )


def test_comparison_page_shows_effects_of_an_ablation(tmp_path: Path) -> None:
    page = comparison(tmp_path, **examples.ablated())
    assert "Effect of each setting" in page.text
    assert "8 against 4: better, +2.0 points (+0.5 to +3.5)" in page.text
    assert "Runs failed, and no combination has every value." in page.text
    assert "Effect of each setting" not in comparison(tmp_path / "plain").text


def test_comparison_page_says_practically_equal_and_how_probable(tmp_path: Path) -> None:
    result = examples.comparison(("lora", "full"))
    (difference,) = result["differences"]
    difference |= {"verdict": "practically equal", "low": -0.004, "high": 0.006, "value": 0.001, "p_better": 0.61}
    page = page_of(examples.write_comparison(tmp_path, {**result, "margin": 0.01, "detectable": 0.03}))
    assert "practically equal" in page.text
    assert "is practically equal to full" in page.text
    assert "whole interval is nearer to zero than 1.0 points" in page.text
    assert f"61{numbers.THIN}%" in page.text
    assert "one of 3.0 points would be shown four times in five" in page.text


def test_comparison_page_at_chance_recommends_nothing(tmp_path: Path) -> None:
    said = "no method is shown to be better than always answering the most frequent label (50.0 % of the rows)"
    page = comparison(tmp_path, recommendation=None, at_chance=said, notes=[said])
    assert "none is shown to be better than always answering the most frequent label" in page.one("h1").text
    assert said in page.text
    assert "Why" not in page.one("header").text


def test_comparison_page_with_one_seed_states_it(tmp_path: Path) -> None:
    result = examples.comparison(seeds=(7,))
    page = page_of(examples.write_comparison(tmp_path, result))
    assert "one seed only" in page.one("header").text
    assert "one seed: intervals do not hold what another training seed would change" in page.text


def test_comparison_page_with_one_seed_calls_no_method_better(tmp_path: Path) -> None:
    """Also of a comparison whose file, written by an earlier version, does."""
    result = examples.comparison(seeds=(7,))
    assert any(entry["verdict"] != "no difference shown" for entry in result["differences"])
    page = page_of(examples.write_comparison(tmp_path, result))
    verdicts = {e.text for e in page.all("td", "verdict")}
    assert verdicts == {"one seed: it may be reversed", "no difference shown"}
    assert "one seed" in page.one("h1").text or "not shown to be worse" in page.one("h1").text
    assert "worse by" not in page.text
    assert "these intervals compare the models at hand" in page.text


def test_comparison_page_shows_spread_of_seeds(tmp_path: Path) -> None:
    result = examples.comparison()
    result["seed_spread"] = 0.0123
    result["methods"][0]["seed_spread"] = 0.0456
    page = page_of(examples.write_comparison(tmp_path, result))
    assert "Seeds of one method differ with a standard deviation of 1.2 points" in page.text
    assert any(cell.text == "4.6" for cell in page.all("td"))


def test_comparison_page_lists_failed_runs_with_reason(tmp_path: Path) -> None:
    result = examples.comparison()
    lora = next(method for method in result["methods"] if method["name"] == "lora")
    del lora["runs"]["1"]
    lora["failed"] = {"1": "the loss is not finite since step 12"}
    gone = {
        "name": "prompt",
        "title": "Prompt tuning",
        "settings": {"name": "prompt"},
        "figure": None,
        "cost": {},
        "runs": {},
    }
    result["methods"].append({**gone, "failed": {"0": HOSTILE}})
    page = page_of(examples.write_comparison(tmp_path, result))
    assert "lora, seed 1: the loss is not finite since step 12" in page.text
    assert "2 of 3" in page.text
    assert "prompt, seed 0: </script>" in page.text


def test_comparison_page_of_one_no_or_unfinished_methods(tmp_path: Path) -> None:
    page = page_of(examples.write_comparison(tmp_path / "one", examples.comparison(names=("bitfit",))))
    assert page.one("h1").text.startswith("bitfit reaches")
    nothing = {"methods": [], "differences": [], "front": {}}
    page = comparison(tmp_path / "none", **nothing)
    assert page.one("h1").text == "No run of this comparison gave a result"
    page = comparison(tmp_path / "running", **nothing, status="running")
    assert "not finished" in page.one("h1").text
    assert "resumes the comparison" in page.text


def test_comparison_page_unmeasured_cost_is_noted(tmp_path: Path) -> None:
    result = examples.comparison()
    for method in result["methods"]:
        method["cost"]["peak_memory_bytes"] = None
    result["methods"][1]["cost"]["training_seconds"] = None
    page = page_of(examples.write_comparison(tmp_path, result))
    assert "peak_memory_bytes" not in [e.attributes["value"] for e in page.all("input")]
    assert "Not measured, so not drawn: lora." in page.text


def test_comparison_page_links_runs_inside_folder_only(tmp_path: Path) -> None:
    examples.write_run(tmp_path / "lora-seed0")
    write_report(tmp_path / "lora-seed0")
    (tmp_path.parent / "report.html").write_text("secret")
    result = examples.comparison()
    result["methods"][0]["runs"]["0"]["folder"] = ".."
    page = page_of(examples.write_comparison(tmp_path, result))
    assert [a.attributes["href"] for a in page.all("a")] == ["./lora-seed0/report.html"]


# -- a run --------------------------------------------------


def test_run_page_shows_metrics_curves_and_cost(tmp_path: Path) -> None:
    page = page_of(examples.write_run(tmp_path))
    assert page.one("h1").text == "lora reaches 78.1\N{NARROW NO-BREAK SPACE}% accuracy on test rows"
    assert "74.8 to 81.4 on 500 test rows" in page.one("header").text
    assert "338,690 parameters" in page.one("header").text
    titles = {e.text for e in page.all("text", "axis-title")}
    assert {"Loss", "Validation accuracy, %", "Learning rate"} <= titles
    assert "saved: step 250" in page.text
    assert "Diagnosis, step 375: the validation loss has risen twice" in page.text
    assert "fewer epochs" in page.text
    assert "confidence: 0.95" in page.text
    assert page.all("pre")[-1].text == "graftwerk train runs/movies-lora/config.yaml"
    for chart in page.all("svg", "curve"):
        track = json.loads(chart.attributes["data-track"] or "")
        assert track == sorted(track)
        assert all(isinstance(x, int | float) and text.startswith("Step ") for x, _, text in track)


@pytest.mark.parametrize(("processes", "said"), [(None, False), (1, False), (2, True)])
def test_run_page_memory_names_number_of_processes(tmp_path: Path, processes: int | None, said: bool) -> None:
    manifest = examples.manifest()
    manifest["cost"]["processes"] = processes
    text = page_of(examples.write_run(tmp_path, manifest)).text
    assert "while training" in text
    assert ("while training, 2 processes together" in text) == said


def test_run_page_more_than_forty_messages_are_counted(tmp_path: Path) -> None:
    events = [{"kind": "warning", "step": at, "text": f"warning number {at}."} for at in range(43)]
    text = page_of(examples.write_run(tmp_path, examples.manifest(), [*examples.events(), *events[:39]])).text
    assert "more are in metrics.jsonl" not in text
    text = page_of(examples.write_run(tmp_path, examples.manifest(), events)).text
    assert "warning number 39." in text
    assert "warning number 40." not in text
    assert "3 more are in metrics.jsonl." in text


def at_chance(at_chance: bool = True, **more: Any) -> dict[str, Any]:
    """`chance` of a manifest."""
    difference = {"value": 0.281, "low": 0.22, "high": 0.34}
    known = {"metric": "accuracy", "guess": "always answering `positive`", "guess_value": 0.5, "difference": difference}
    return {"test": {**known, "at_chance": at_chance, **more}}


def test_run_page_at_chance_says_so_first(tmp_path: Path) -> None:
    text = "accuracy 51.0 % is not shown to be better than always answering `positive` (50.0 %)"
    chance = at_chance(text=text, hint="more epochs; `graftwerk errors`")
    event = {"kind": "diagnosis", "step": 375, "code": "at_chance", "text": f"test rows: {text}"}
    page = page_of(examples.write_run(tmp_path, {**examples.manifest(), "chance": chance}, [*examples.events(), event]))
    assert page.one("h1").text == "lora is not shown to be better than always answering positive"
    assert [code.text for code in page.all("code") if "h1" in code.inside] == ["positive"]
    (message,) = [each for each in page.all("li") if "At chance level" in each.text]
    assert message.attributes["class"] == "grave"
    assert "51.0 %" in message.text
    assert page.text.count("51.0 %") == 1  # not told again among the messages of the run


def test_run_page_above_chance_says_by_how_much(tmp_path: Path) -> None:
    page = page_of(examples.write_run(tmp_path, {**examples.manifest(), "chance": at_chance(False)}))
    assert "lora reaches" in page.one("h1").text
    said = "Accuracy: better than always answering positive (50.0\u202f%) by 28.1 points (22.0 to 34.0)."
    assert said in page.text


def test_run_page_shows_mistakes(tmp_path: Path) -> None:
    page = page_of(examples.write_run(tmp_path, analysis_=examples.analysis()))
    assert "109 of 500 test rows are answered wrongly." in page.text
    cells = page.all("span", "heat")
    assert [cell.text for cell in cells] == ["190", "60", "50", "200"]
    assert [cell.attributes["class"] for cell in cells] == [
        "heat right heat-4", "heat wrong heat-2", "heat wrong heat-2", "heat right heat-5"
    ]  # fmt: skip
    assert "The 1 most frequent of 90 pairs of labels." in page.text
    assert "Expected calibration error 10.5\u202f%" in page.text
    dots = [group for group in page.all("g", "point") if "Sure to" in (group.attributes.get("data-tip") or "")]
    assert len(dots) == 4  # two bins in two widths
    assert len(page.all("circle", "spot")) == 6
    worst = [each.text for each in page.all("li") if "facts" not in each.inside and "a film of" in each.text]
    assert len(worst) == 7
    assert "negative" in worst[0]
    assert "positive (98.0\u202f%)" in worst[0]
    assert "movies.csv:2" in worst[0]
    assert "3 more" in page.text  # five are open
    assert "PER: Ann Lee" in page.text
    assert "Threshold" in page.text


def test_run_page_without_predictions_has_no_section_of_mistakes(tmp_path: Path) -> None:
    assert "What it gets wrong" not in page_of(examples.write_run(tmp_path)).text


def test_run_page_without_held_out_rows_states_it(tmp_path: Path) -> None:
    manifest = examples.manifest()
    manifest.update(metrics={}, best=None)
    events = [event for event in examples.events() if event["kind"] in ("start", "step")]
    page = page_of(examples.write_run(tmp_path, manifest, events))
    assert "no rows were held out" in page.one("h1").text
    assert "nothing says how good this is" in page.text
    assert "there is no validation curve" in page.text


def test_run_page_without_test_rows_warns_of_validation_bias(tmp_path: Path) -> None:
    manifest = examples.manifest()
    del manifest["metrics"]["test"]
    page = page_of(examples.write_run(tmp_path, manifest))
    assert "on validation rows" in page.one("h1").text
    assert "a little too good" in page.text


@pytest.mark.parametrize("status", ["diverged", "interrupted", "running", "something new"])
def test_run_page_of_failed_run_shows_error(tmp_path: Path, status: str) -> None:
    manifest = examples.manifest()
    manifest.update(status=status, metrics={}, best=None, cost={})
    manifest["error"] = {"what": "loss is nan at step 12", "hint": "a lower learning rate", "recovered": "step-000010"}
    events = [{"kind": "step", "step": 5, "loss": 0.7}, {"kind": "step", "step": 10, "loss": "nan"}]
    page = page_of(examples.write_run(tmp_path, manifest, events))
    for said in (
        "loss is nan at step 12",
        "a lower learning rate",
        "Recovered: step-000010",
        "1 logged loss had no finite value",
    ):
        assert said in page.text


def test_run_page_missing_or_truncated_log_is_noted(tmp_path: Path) -> None:
    folder = examples.write_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"kind": "step", "st')
    assert "cannot be read: 1 line of metrics.jsonl" in page_of(folder).text
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").write_text("a: [b\n")
    page = page_of(folder)
    assert "no curves can be drawn" in page.text
    assert "a: [b" in page.text


def test_run_page_shows_issues_with_hint(tmp_path: Path) -> None:
    manifest = examples.manifest()
    finding = {"code": "leakage", "message": "3 texts are in two splits", "rows": 3, "example": HOSTILE, "grave": True}
    manifest["data"]["findings"] = [{**finding, "hint": "remove them"}]
    page = page_of(examples.write_run(tmp_path, manifest))
    (item,) = [e for e in page.all("li") if "3 texts" in e.text]
    assert item.attributes["class"] == "grave"
    assert "remove them" in item.text


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_page_shows_lengths_and_rows_of_each_label(kind: str, tmp_path: Path) -> None:
    tree = examples.manifest() if kind == "run" else examples.comparison(names=("full", "lora"))
    write = examples.write_run if kind == "run" else examples.write_comparison
    cells = "|".join(e.text for e in page_of(write(tmp_path / "few", tree)).elements if e.name in ("th", "td"))
    cells = cells.replace("\u202f", " ")
    assert "Rows of|Rows|Median tokens|95 %|Longest|Cut|train|2,000|26|49|78|3|validation" in cells
    assert "Label|train|validation|test|positive|1,188 (59.4 %)|249 (49.8 %)|250 (50.0 %)|negative|812" in cells
    counts = {f"label {number}": {"train": 100 - number} for number in range(40)}
    tree["data"]["summary"] = {"labels": {**counts, "none": {}}}
    page = page_of(write(tmp_path / "many", tree))
    assert any(each.text == "Rows of each of the 41 labels" for each in page.all("summary"))
    tree["data"]["summary"] = {"labels": {"odd": {}}, "lengths": {}}
    assert "Rows of each" not in page_of(write(tmp_path / "odd", tree)).text


# -- what comes in --------------------------------------------------


def poisoned(tree: Any, text: str) -> Any:
    """Every text and every key of a tree replaced by a hostile one, as far as the structure lets it."""
    kept = {"kind", "status", "metric", "verdict", "prefer"}
    if isinstance(tree, dict):
        return {key: value if key in kept else poisoned(value, text) for key, value in tree.items()}
    if isinstance(tree, list):
        return [poisoned(value, text) for value in tree]
    return text + tree if isinstance(tree, str) else tree


@settings(max_examples=8)
@given(st.one_of(st.just(HOSTILE), st.text(max_size=40)))
def test_page_escapes_hostile_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    clean = examples.comparison(names=("full", "lora"))
    shape = [e.name for e in page_of(examples.write_comparison(folder / "clean", clean)).elements]
    page = page_of(examples.write_comparison(folder / "comparison", poisoned(clean, text)))
    assert {e.name for e in page.elements} == set(shape)
    assert len(page.all("script")) == 1
    files = (poisoned(tree, text) for tree in (examples.manifest(), examples.events(), examples.analysis()))
    run = examples.write_run(folder / "run", *files)
    (run / "config.yaml").write_text(text, encoding="utf-8", errors="replace")
    page = page_of(run)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not [e for e in page.elements if any(name.startswith("on") for name in e.attributes)]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=12)
@given(st.data())
def test_page_is_written_whatever_the_files_hold(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("odd")
    result, manifest, events = examples.comparison(names=("full", "lora")), examples.manifest(), examples.events()
    analysis = examples.analysis()
    manifest["chance"] = at_chance()
    for tree in (result, manifest, events, analysis):
        for _ in range(3):
            replace_somewhere(tree, data)
    page_of(examples.write_comparison(folder / "comparison", result))
    page_of(examples.write_run(folder / "run", manifest, events, analysis))


def replace_somewhere(tree: Any, data: st.DataObject) -> None:
    """Put anything at a random place of a tree."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if not isinstance(tree[key], dict | list) or data.draw(st.integers(0, 2)) == 0:
            tree[key] = data.draw(ANYTHING)
            return
        tree = tree[key]


def test_write_report_empty_folder_or_damaged_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run nor a comparison"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        write_report(tmp_path / "missing")
    for content in ("{", "[]", "\x00"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_write_report_full_disk_keeps_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = examples.write_run(tmp_path)
    before = write_report(folder).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        write_report(folder)
    assert caught.value.recovered
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_write_report_is_deterministic(tmp_path: Path) -> None:
    folder = examples.write_comparison(tmp_path, examples.comparison())
    assert write_report(folder).read_bytes() == write_report(str(folder)).read_bytes()


def test_comparison_page_pair_is_shown_from_better_side(tmp_path: Path) -> None:
    result = examples.comparison(names=("full", "probe"))
    (pair,) = result["differences"]
    pair.update(a="probe", b="full", value=-0.06, low=-0.08, high=-0.04, verdict="worse")
    page = page_of(examples.write_comparison(tmp_path, result))
    assert [e.text for e in page.all("td", "verdict")] == ["full is better"]
    assert "full against probe+6.0+4.0 to +8.0" in page.text
    assert "worse by 6.0 points (4.0 to 8.0)" in page.text


def test_comparison_page_absurd_values_count_as_missing(tmp_path: Path) -> None:
    result = examples.comparison()
    for method, value in zip(result["methods"], (1e308, -1e308, 1e-320, 0.0, 5.0, 1e31, 2.0), strict=True):
        method["cost"]["training_seconds"] = method["figure"]["high"] = value
    page = page_of(examples.write_comparison(tmp_path, result))
    assert "Not measured, so not drawn: full, lora and ia3." in page.text
    assert "nan" not in " ".join(str(e.attributes) for e in page.all("line"))
