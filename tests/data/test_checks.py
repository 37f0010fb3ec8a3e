"""Checks before a model is loaded: what stops a run, what is counted, and what is said."""

from __future__ import annotations

import pytest

from graftwerk.data.checks import PlacedRows, check_duplicates, check_labels, check_truncation, label_names
from graftwerk.errors import AdapterError, DataError


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["01", "1", "0"], ("0", "01", "1")),
        (["b", "B", "ä", "a"], ("B", "a", "b", "ä")),
        (["9" * 30, "1"], ("1", "9" * 30)),
    ],
)
def test_label_names_sorts_by_number_or_code_point(labels: list[str], names: tuple[str, ...]) -> None:
    assert label_names(labels) == names
    assert label_names(labels[::-1]) == names


def test_check_labels_one_class_raises() -> None:
    with pytest.raises(DataError, match="the one class 'a'") as caught:
        check_labels({"train": ["a", "a"], "validation": [], "test": []}, None, "rows.csv")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("split", ["validation", "test"])
def test_check_labels_class_missing_in_train_raises_with_both_sets(split: str) -> None:
    with pytest.raises(DataError, match=f"the {split} rows have the class 'c'") as caught:
        check_labels({"train": ["a", "b"], "validation": [], "test": [], split: ["c", "a"]}, None, "rows.csv")
    assert caught.value.where == f"train: a, b; {split}: a, c"


def test_check_labels_of_adapter_keep_order_and_unknown_class_raises() -> None:
    names, _ = check_labels({"train": ["b"], "validation": [], "test": []}, ("b", "a"), "rows.csv")
    assert names == ("b", "a")
    with pytest.raises(AdapterError, match="the class 'c'") as caught:
        check_labels({"train": ["c", "a"], "validation": [], "test": []}, ("b", "a"), "rows.csv")
    assert caught.value.where == "rows: a, c; adapter: b, a"
    assert caught.value.exit_code == 4


def codes(findings: tuple[object, ...]) -> list[str]:
    return [finding.code for finding in findings]  # type: ignore[attr-defined]


def test_check_labels_reports_spellings_and_rare_and_absent_classes() -> None:
    used = {"train": ["Pos", "pos", "pos", "neg", "neg", "Pos", "odd"], "validation": ["pos", "neg"], "test": []}
    _, findings = check_labels(used, None, "rows.csv")
    assert codes(findings) == ["label-spelling", "rare-classes", "absent-classes"]
    assert findings[0].grave
    assert not findings[1].grave
    assert findings[2].example == "Pos, odd"


def test_check_labels_one_class_per_row_is_severe() -> None:
    _, [finding] = check_labels({"train": [str(at) for at in range(9)], "validation": [], "test": []}, None, "rows.csv")
    assert finding.grave
    assert "right column" in str(finding.hint)


def test_check_labels_few_rare_classes_are_not_severe() -> None:
    """Three of four classes have one row, which is three of 33 rows: the label column is the right one."""
    used = {"train": ["a"] * 30 + ["b", "c", "d"], "validation": [], "test": []}
    [_, finding] = sorted(check_labels(used, None, "rows.csv")[1], key=lambda finding: finding.code)
    assert (finding.code, finding.rows, finding.example) == ("rare-classes", 3, "b, c, d")
    assert not finding.grave


def test_check_labels_more_than_twenty_classes_are_truncated_and_counted() -> None:
    used = {"train": [f"c{at:02d}" for at in range(23)] * 2, "validation": ["c00"], "test": []}
    [finding] = check_labels(used, None, "rows.csv")[1]
    assert finding.example is not None
    assert finding.example.startswith("c01, c02, ")
    assert finding.example.endswith(", c20, and 2 more")


@pytest.mark.parametrize(("most", "severe"), [(89, None), (90, False), (98, False), (99, True)])
def test_check_labels_skew_is_told_from_nine_in_ten_and_severe_from_99_in_100(most: int, severe: bool | None) -> None:
    used = {"train": ["a"] * most + ["b"] * (100 - most), "validation": [], "test": []}
    found = [issue for issue in check_labels(used, None, "rows.csv")[1] if issue.code == "label-skew"]
    assert [(issue.rows, issue.grave) for issue in found] == ([] if severe is None else [(100 - most, severe)])


@pytest.mark.parametrize(("classes", "each", "told"), [(49, 4, False), (50, 4, True), (50, 5, False)])
def test_check_labels_many_classes_of_few_rows_are_told(classes: int, each: int, told: bool) -> None:
    used = {"train": [f"c{at:02d}" for at in range(classes)] * each, "validation": [], "test": []}
    assert any(issue.code == "many-classes" for issue in check_labels(used, None, "rows.csv")[1]) == told


def test_check_labels_ordinary_labels_give_no_issue() -> None:
    used = {"train": ["a", "b"] * 5, "validation": ["a", "b"], "test": ["b", "a"]}
    assert check_labels(used, None, "rows.csv") == (("a", "b"), ())


def placed(file: str, texts: list[str], labels: list[str] | None = None) -> PlacedRows:
    return PlacedRows(texts, labels or ["x"] * len(texts), lambda index: f"{file}:{index + 1}")


def test_check_duplicates_counts_exact_and_folded_texts() -> None:
    texts = ["A b", "a  B", "A b", "c", "a b"]
    findings = check_duplicates({"train": placed("a.csv", texts)})
    assert codes(findings) == ["duplicates"]
    assert findings[0].rows == 3
    assert "(1 to the letter)" in findings[0].message
    assert findings[0].example == "a.csv:1 and a.csv:2: 'a B'"


def test_check_duplicates_one_text_with_two_classes_is_reported() -> None:
    findings = check_duplicates({"train": placed("a.csv", ["a", "A", "b"], ["x", "y", "x"])})
    assert codes(findings) == ["duplicates", "conflicting-labels"]
    assert findings[1].rows == 2
    assert findings[1].example == "a.csv:1: 'a' is x and y"


def test_check_duplicates_leakage_between_splits_is_severe() -> None:
    texts = {"train": ["a b", "c"], "validation": ["A  b", "d", "c"], "test": ["D", "e"]}
    findings = check_duplicates({split: placed(f"{split}.csv", rows) for split, rows in texts.items()})
    assert codes(findings) == ["leakage", "leakage"]
    assert all(finding.grave for finding in findings)
    assert "2 of 3 validation rows also stand in the train rows (1 to the letter" in findings[0].message
    assert findings[0].example == "train.csv:1 and validation.csv:1: 'A b'"
    assert "1 of 2 test rows also stand in the validation rows (0 to the letter" in findings[1].message


def test_check_duplicates_distinct_rows_give_no_issue() -> None:
    assert check_duplicates({"train": placed("a.csv", ["a", "b"]), "test": placed("b.csv", ["c"])}) == ()


def test_check_truncation_counts_below_limit_and_raises_above() -> None:
    assert check_truncation([0, 0], 64, 0.2) == ()
    [finding] = check_truncation([0, 0, 0, 0, 10], 64, 0.2)
    assert (finding.code, finding.rows) == ("truncated", 1)
    assert "lose 10 tokens" in finding.message
    with pytest.raises(DataError, match=r"2 of 5 train rows \(40%\) are longer than 64 tokens") as caught:
        check_truncation([0, 0, 0, 5, 10], 64, 0.2)
    assert "data.max_length" in str(caught.value.hint)
    assert check_truncation([1], 64, 1.0)[0].rows == 1


@pytest.mark.parametrize(
    "pair",
    [
        ("1", "1.0"), ("0", "-0.0"), ("1.50", "1.5"), ("1e1", "10"), ("True", "true"), ("a b", "a  B"),
        ("caf\u00e9", "cafe\u0301"), ("pos", "p\u200bos"),
    ],
)  # fmt: skip
def test_check_labels_one_class_in_two_spellings_is_severe(pair: tuple[str, str]) -> None:
    _, findings = check_labels({"train": [*pair, "other"] * 3, "validation": [], "test": []}, None, "rows.csv")
    (finding,) = [finding for finding in findings if finding.code == "label-spelling"]
    assert finding.grave
    assert all(repr(name) in finding.message for name in pair)


@pytest.mark.parametrize("pair", [("1", "01"), ("1", "-1"), ("1", "1.5"), ("a", "b"), ("1.0.0", "1.0")])
def test_check_labels_distinct_classes_are_not_spelling_variants(pair: tuple[str, str]) -> None:
    _, findings = check_labels({"train": [*pair, "other"] * 3, "validation": [], "test": []}, None, "rows.csv")
    assert findings == ()


@pytest.mark.parametrize(
    ("name", "grave"), [("nan", True), ("NaN", True), ("NULL", True), ("<NA>", True), ("N/A", True), ("None", False)]
)
def test_check_labels_class_that_reads_like_missing_value_is_reported(name: str, grave: bool) -> None:
    _, (finding,) = check_labels({"train": ["a", "b", name] * 3, "validation": [], "test": []}, None, "rows.csv")
    assert (finding.code, finding.rows, finding.grave) == ("missing-values", 3, grave)


def test_check_labels_scores_as_classes_are_reported() -> None:
    scores = [f"{at / 25:.2f}" for at in range(125)]
    _, (finding,) = check_labels({"train": scores * 4, "validation": [], "test": []}, None, "rows.csv")
    assert (finding.code, finding.rows, finding.grave) == ("many-classes", 500, True)
    _, (finding,) = check_labels({"train": ["0.5", "1.0", "1.5"] * 9, "validation": [], "test": []}, None, "rows.csv")
    assert (finding.code, finding.grave) == ("many-classes", False)
    _, findings = check_labels({"train": ["1.0", "2.0"] * 9, "validation": [], "test": []}, None, "rows.csv")
    assert findings == (), "whole numbers, all written alike"


def test_check_labels_too_few_rows_per_class_are_reported() -> None:
    names = [f"class {at}" for at in range(60)]
    _, (finding,) = check_labels({"train": names * 4, "validation": [], "test": []}, None, "rows.csv")
    assert (finding.code, finding.grave) == ("many-classes", False)
    assert check_labels({"train": names * 5, "validation": [], "test": []}, None, "rows.csv")[1] == ()
