"""A notebook, run headless in a kernel of its own: a bar that is redrawn in place, lines, and nothing when quiet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


def test_notebook_shows_bar_and_lines(run_file: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = run_file(output_dir=str(tmp_path / "run"))
    hushed = (
        "import warnings, tqdm\nwarnings.simplefilter('ignore', tqdm.TqdmWarning)  # wants ipywidgets, once imported"
    )
    cells = [
        f"{hushed}\nimport graftwerk as gw\nsettings = {settings!r}",
        "run = gw.train(settings)",
        "quiet = gw.train({**settings, 'output_dir': settings['output_dir'] + '-quiet'}, quiet=True)",
        "predictor = gw.open(run)\npredictor('a small animal')['label']",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    _, trained, quiet, answered = (cell.outputs for cell in notebook.cells)
    pages = [output["data"]["text/html"] for output in trained if output.output_type == "display_data"]
    assert len(pages) == 1, "one bar, redrawn in place"
    assert '<progress value="1.0000"></progress> 12/12  loss ' in pages[0]
    streams = [output for output in trained if output.output_type == "stream"]
    assert {output.name for output in streams} == {"stdout"}, "a page shows stderr as trouble"
    said = "".join(output.text for output in streams)
    for words in ("reading the data ...", "first batch", "validation accuracy"):
        assert words in said
    problems = ("is not shown to be better",)  # of a run this small: they are said all the same
    assert [output for output in quiet if not any(words in output.text for words in problems)] == []
    assert answered[0].output_type == "execute_result"
