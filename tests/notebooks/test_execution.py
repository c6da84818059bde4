"""Every notebook, and the code of its solutions, from a clean kernel to its end, against what is committed."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are run with the extra [notebooks]")
nbclient = pytest.importorskip("nbclient", reason="notebooks are run with the extra [notebooks]")

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
MOST_SECONDS = 900  # of a cell: a notebook takes under three minutes on a laptop, and CI's machines are shared


def pictures(cell) -> int:
    return sum("image/png" in out.get("data", {}) for out in cell.outputs)


def sources(cell) -> list[str]:
    return [out["data"]["text/markdown"] for out in cell.outputs if "text/markdown" in out.get("data", {})]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_it_runs_and_shows_what_is_committed(file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # matrices are small, and threads that wait for a shared core are slow
    committed, fresh = nbformat.read(file, 4), nbformat.read(file, 4)
    nbformat.validate(committed)
    prose = "\n".join(cell.source for cell in fresh.cells if cell.cell_type == "markdown")
    solutions = re.findall(r"^```python\n(.*?)^```", prose.partition("## Exercises")[2], flags=re.M | re.S)
    fresh.cells += [nbformat.v4.new_code_cell(code) for code in solutions]
    client = nbclient.NotebookClient(
        fresh, timeout=MOST_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    for kept, made in zip(committed.cells, fresh.cells, strict=False):
        if kept.cell_type == "code":
            assert pictures(kept) == pictures(made), f"figures differ, run `make notebooks`:\n{kept.source}"
            assert sources(kept) == sources(made), f"the source has changed, run `make notebooks`:\n{kept.source}"
