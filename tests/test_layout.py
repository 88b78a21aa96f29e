"""The house rules of docs/DESIGN.md, read from the source: who may import whom, what stays out, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jevons"
FILES = sorted(ROOT.rglob("*.py"))

# from the roof to the ground; rooms on one floor do not see each other
FLOORS = [{"cli"}, {"stages"}, {"run"}, {"recipe", "report", "progress"}, {"chapter"}, {"plot", "section", "record"}]
FLOORS += [{"server"}, {"engine", "train", "cost"}, {"model"}, {"tasks"}, {"kernels", "data"}]
LEVEL = {room: -level for level, floor in enumerate(FLOORS) for room in floor}

MAY_DISTRIBUTE = ("train/parallel.py", "train/checkpoint.py", "engine/")
WITHOUT_TORCH = ("cost/", "model/config.py", "model/memory.py", "model/family.py")


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_a_floor():
    assert {room(f) for f in FILES} - {"__init__"} <= LEVEL.keys()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_only_go_down(file):
    for imported in imports(file):
        package, _, rest = imported.partition(".")
        if package == "jevons":
            target = rest.partition(".")[0]
            assert target == room(file) or LEVEL[target] < LEVEL[room(file)], f"{name(file)} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_what_stays_out(file):
    packages = {imported.partition(".")[0] for imported in imports(file)}
    assert "transformers" not in packages, "transformers is a test oracle"
    if name(file).startswith(WITHOUT_TORCH):
        assert not packages & {"torch", "safetensors", "tokenizers"}
    if not name(file).startswith(MAY_DISTRIBUTE):
        attributes = {ast.unparse(n) for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}
        assert not [n for n in {*imports(file), *attributes} if n.startswith("torch.distributed")]


def test_costs_and_configurations_do_not_load_torch():
    modules = [name(f).removesuffix(".py").replace("/", ".") for f in FILES if name(f).startswith(WITHOUT_TORCH) and f.stem != "__init__"]
    code = f"import sys, {', '.join(f'jevons.{m}' for m in modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_are_short_nouns(file):
    text = file.read_text(encoding="utf-8")
    assert file.stem not in ("utils", "util", "helpers", "common", "misc")
    if file.stem == "__init__":
        assert file.parent == ROOT or not text  # the package's own says its name and version
        assert not list(imports(file))
    else:
        assert len(text.splitlines()) <= 400
        assert ast.get_docstring(ast.parse(text)), "what problem does this file solve, and how?"


def test_a_transformer_is_a_short_read():
    # all of model/ and the kernels that it imports: every line to read in order to know what a DeepSeek-V3 computes here. It has no memory
    # layers, so these two are not among them
    model = [f for f in FILES if room(f) == "model" and f.stem not in ("memory", "ultramem")]
    kernels = {ROOT / "kernels" / f"{i.split('.')[2]}.py" for f in model for i in imports(f) if i.startswith("jevons.kernels.")}
    assert len(kernels) >= 3
    lines = sum(bool(line.strip()) for f in [*model, *kernels] for line in f.read_text(encoding="utf-8").splitlines())
    assert lines < 1300, lines
