"""Every notebook, and the code of its solutions, from a clean kernel to its end, against what is committed."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[notebooks]"')
nbclient = pytest.importorskip("nbclient", reason='needs pip install -e ".[notebooks]"')

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
MOST_SECONDS = 900  # of a cell: a notebook takes under three minutes on a laptop, and CI's machines are shared
TRAIN_OR_TIME = ("02", "04", "07", "09")  # what these say in words may hang on last digits, or on the clock
FEWEST_COLOURS = 100  # of a figure that is not blank; those here have 240 and more


def pictures(cell) -> list[int]:
    """Of each figure, how many colours it has."""
    pngs = [out["data"]["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
    images = [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in pngs]
    return [len(image.getcolors(image.width * image.height)) for image in images]


def sources(cell) -> list[str]:
    return [out["data"]["text/markdown"] for out in cell.outputs if "text/markdown" in out.get("data", {})]


def printed(cell) -> list[str]:
    """The lines that a cell prints, a # for every number."""
    text = "".join(out["text"] for out in cell.outputs if out.get("name") == "stdout")
    return re.sub(r"\s*-?\d[\d.,]*(e[-+]\d+)?", "#", text.replace("\n", "\0")).rstrip("\0").split("\0")


def run(notebook) -> None:
    """Execute all cells; where the kernel dies, fail with the cell that it was at."""
    where = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, timeout=MOST_SECONDS, kernel_name="python3", resources=where)
    started = []
    client.on_cell_execute = lambda cell, cell_index: started.append(cell)
    try:
        client.execute()
    except nbclient.exceptions.DeadKernelError:
        pytest.fail(f"the kernel died at:\n{started[-1].source if started else 'its start'}")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_it_runs_and_shows_what_is_committed(file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # matrices are small, and threads that wait for a shared core are slow
    committed, fresh = nbformat.read(file, 4), nbformat.read(file, 4)
    nbformat.validate(committed)
    prose = "\n".join(cell.source for cell in fresh.cells if cell.cell_type == "markdown")
    solutions = re.findall(r"^```python\n(.*?)^```", prose.partition("## Exercises")[2], flags=re.M | re.S)
    fresh.cells += [nbformat.v4.new_code_cell(code) for code in solutions]
    run(fresh)
    for kept, made in zip(committed.cells, fresh.cells, strict=False):
        if kept.cell_type == "code":
            remedy = f"run `make notebooks`:\n{kept.source}"
            assert len(pictures(kept)) == len(pictures(made)), f"figures differ, {remedy}"
            assert min(pictures(kept), default=FEWEST_COLOURS) >= FEWEST_COLOURS, f"a figure is blank, {remedy}"
            assert sources(kept) == sources(made), f"the source has changed, {remedy}"
            if file.stem.startswith(TRAIN_OR_TIME):
                assert len(printed(kept)) == len(printed(made)), f"other lines are printed, {remedy}"
            else:
                assert printed(kept) == printed(made), f"other words are printed, {remedy}"
