"""What a stranger may type wrong, of keys and commands: exit codes with words that help, never a traceback."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from graftwerk.training.train import train
from tests.cli.commands import Run, run_file


@pytest.fixture(scope="module")
def place(tiny_encoder: Path, glosses: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a run file, and files of rows that are not as they should be."""
    folder = tmp_path_factory.mktemp("stranger")
    path = run_file(folder, tiny_encoder, glosses, training={"max_steps": 1, "report_to": ["jsonl"]})
    train(path, quiet=True)
    for name, content in {
        "rows.csv": b"text,label\n" + b"".join(b"bird %d,%d\n" % (n, n % 2) for n in range(40)),
        "empty.csv": b"",
        "header.csv": b"text,label\n",
        "binary.csv": bytes(range(256)) * 9,
        "numbers.csv": b"a,b\n1,2\n3,4\n",
        "twice.csv": b"text,text,label\na,b,c\n",
        "wide.csv": "text,label\nä,1\n".encode("utf-16"),
        "lists.jsonl": b'[1, 2]\n"a"\n',
        "broken.json": b"{no",
        "book.xlsx": b"PK\x03\x04",
    }.items():
        (folder / name).write_bytes(content)
    return folder


BAD = """
init no.csv | there is no file or folder no.csv
init empty.csv | its first line names the columns
init header.csv | below a header, each line is a row
init binary.csv | data.encoding
init numbers.csv | no column holds text
init twice.csv | rename one of them
init wide.csv | data.encoding=utf-16
init lists.jsonl | no row can be read: the first is a list, not an object
init broken.json | one object a line is .jsonl
init book.xlsx | rows are read from .csv
init - | standard input only once
init '' | the value of `data` is empty
init https://example.com/rows.csv | download it first
init rows.csv --model '' | the value of `model` is empty
init rows.csv more.csv | graftwerk init --help
train rows.csv | `graftwerk init rows.csv` writes one for it
train . | give the path of a .yaml file
train run.yaml --epochs 3 | graftwerk train --help
train run.yaml epochs | is not of the form key=value
train run.yaml method=LoRA | did you mean `lora`?
train run.yaml task=Classification | did you mean `classification`?
train run.yaml data.train=rows.csv data.delimiter=; --overwrite | `data.delimiter` names it
train run.yaml data.train=rows.csv data.delimiter=| --overwrite | `data.delimiter` names it
train run.yaml data.delimiter=;; | no character that separates fields
train run.yaml data.delimiter=, --overwrite | leave `data.delimiter` out
train run.yaml data.encoding=klingon | there is no encoding 'klingon'
train run.yaml data.train=rows.csv data.encoding=utf-16 --overwrite | leave `data.encoding` out
train run.yaml evaluation.temperature=0.5 | graftwerk: `evaluation.temperature` does nothing for classification
compare run.yaml methods=lora learning_rate=1e-3, | none at the end
compare run.yaml methods=lora learning_rate=fast,slow | valid number
compare run.yaml methods=lora r=4,8 | here it is `method.r`
predict no "a bird" | give a run folder (`output_dir` of a run file)
predict run.yaml "a bird" | run.yaml is a file, not a folder
predict run '' | leave it out
predict run "a bird" --column text=x | add --data rows.csv
predict run "a bird" --model '' | the value of `model` is empty
predict run --data empty.csv | its first line names the columns
predict run "a bird" --set temperatur=1 | did you mean `temperature`?
predict run "a bird" --set max_tokens=5 | here it is `max_new_tokens`
predict run --data rows.csv -o rows.csv | write the answers to another file
merge run --out m --dtype float8 | float32, bfloat16, float16
merge run --out run | name a new or empty folder
export run --to PEFT --out e | did you mean `peft`? There are
export run --to merged --out e --base-name a/b | leave --base-name out
export run --to peft --out e --base-name 'no name' | its hub id: org/model
export run --to vllm --out e | --to merged
"""


def left_in(folder: Path) -> dict[Path, int]:
    """When each file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_is_answered_with_words_that_help(
    case: str, graftwerk: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = left_in(place)
    command, _, words = case.rpartition(" | ")
    arguments = shlex.split(command)
    said = graftwerk(*arguments, *(["--out", "new.yaml"] if arguments[0] == "init" else []))
    assert said.code in (2, 3, 4, 7), said.err
    assert said.out == ""
    assert words in said.err
    assert "  hint: " in said.err
    assert "Traceback" not in said.err
    assert left_in(place) == before, "nothing is written or lost"


def test_init_of_a_file_that_no_delimiter_fits_takes_that_of_its_header(graftwerk: Run, tmp_path: Path) -> None:
    rows, made = tmp_path / "rows.csv", tmp_path / "run.yaml"
    rows.write_text("text;label\n" + "".join(f"bird {n};{n % 2}{';x' if n % 3 else ''}\n" for n in range(30)))
    assert graftwerk("init", rows, "--out", made).code == 0
    text = made.read_text()
    assert "delimiter: ;  # the header has it, though not all lines fit" in text
    assert "on_bad_row: skip  # 20 rows cannot be read" in text
    assert "text: text  #" in text


def test_delimiters_that_are_no_yaml_are_taken_as_they_stand(graftwerk: Run, place: Path) -> None:
    given = ["train", place / "run.yaml", f"data.train={place / 'rows.csv'}", "data.validation=8", "data.test=8"]
    assert graftwerk(*given, "data.delimiter=,", "--dry-run").code == 0
    (place / "bars.csv").write_text((place / "rows.csv").read_text().replace(",", "|"))
    given[2] = f"data.train={place / 'bars.csv'}"
    assert graftwerk(*given, "data.delimiter=|", "--dry-run").code == 0
    (place / "bars.csv").unlink()
