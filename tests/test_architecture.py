"""Import direction, size limits and documentation, from syntax trees; imports do nothing else."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "parallelisms", "engine")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAY_IMPORT = {  # the longest matching prefix of the importing module wins
    "models.plan": (),
    "models": ("models",),
    "parallelisms": ("parallelisms", "models.plan"),
    "engine.data": ("engine.data",),
    "engine.objectives": ("engine.objectives", "engine.data.batch"),
    "engine": ("engine", "models", "parallelisms"),
    "train": ("engine",),
    # A script runs as a file, where `scripts` cannot be imported; benchmarks run as modules.
    "scripts": ("engine", "models", "parallelisms"),
    "scripts.bench": ("engine", "models", "parallelisms", "scripts"),
}
STANDARD_LIBRARY_ONLY = ("models.plan", "models.registry")
OPTIONAL_PACKAGES = (
    *("flash_attn", "liger_kernel", "torchao", "peft", "wandb", "lm_eval", "vllm", "triton"),
)
OF_TRITON = {"parallelisms.triton_kernels"}  # Triton's decorators work on functions of a module
ROOT_ENTRIES = {
    *("CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "constraints-gpu.txt"),
    *("pyproject.toml", "train.py", "engine", "models", "parallelisms", "scripts", "tests"),
    "train_configs",
}
MADE_BY_TOOLS = {"outputs", "build", "__pycache__"}  # as in .gitignore

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

SOURCES = sorted(p for d in (*PACKAGES, "scripts") for p in (ROOT / d).rglob("*.py"))
SOURCES.append(ROOT / "train.py")
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def dotted(path: Path) -> str:
    """`engine/data/batch.py` -> `engine.data.batch`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {dotted(path) for path in SOURCES}


def inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(tree: ast.AST, *, run_time_only: bool) -> Iterator[ast.AST]:
    """Every node; with `run_time_only` none under `if TYPE_CHECKING` or inside a function."""
    for node in ast.iter_child_nodes(tree):
        if run_time_only and (is_type_checking(node) or isinstance(node, ast.FunctionDef)):
            continue
        yield node
        yield from statements(node, run_time_only=run_time_only)


def imported(source: str, *, run_time_only: bool = False) -> set[str]:
    """Dotted names of imported modules; `from engine import data` counts as `engine.data`."""
    names: set[str] = set()
    for node in statements(ast.parse(source), run_time_only=run_time_only):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.add("a relative import")
                continue
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & MODULES) or {str(node.module)}
    return names


def import_faults(importer: str, source: str) -> list[str]:
    """What `importer` imports against the direction of the packages, one sentence each."""
    names = imported(source)
    rule = max((prefix for prefix in MAY_IMPORT if inside(importer, prefix)), key=len)
    allowed = MAY_IMPORT[rule]
    faults = [
        f"{importer} imports {name}; of ours it may import only {list(allowed)}"
        for name in sorted(names)
        if name.split(".")[0] in {*PACKAGES, "scripts", "train", "tests"}
        and not any(inside(name, prefix) for prefix in allowed)
    ]
    if "a relative import" in names:
        faults.append(f"{importer} uses a relative import; write the whole name")
    if inside(importer, "models"):
        faults += model_faults(importer, source)
    if importer in STANDARD_LIBRARY_ONLY:
        foreign = {n.split(".")[0] for n in imported(source, run_time_only=True)}
        foreign -= set(sys.stdlib_module_names) | {"models"}
        faults += [
            f"{importer} imports {name}; it may use only the standard library" for name in foreign
        ]
    return faults


def model_faults(importer: str, source: str) -> list[str]:
    """Traces of parallelism in model code, which is written for one device."""
    tree = ast.parse(source)
    names = imported(source) | {
        ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    names |= {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return [
        f"{importer} is model code: {name} belongs in parallelisms/ or engine/"
        for name in sorted(names)
        if inside(name, "torch.distributed") or inside(name, "os.environ")
    ]


def size_faults(name: str, source: str) -> list[str]:
    """Files and functions over their limits."""
    lines = source.count("\n")
    faults = [f"{name} has {lines} lines, over {MAX_FILE_LINES}; split it by what changes together"]
    faults = faults if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                faults.append(f"{name}: {node.name} has {lines} lines, over {MAX_FUNCTION_LINES}")
    return faults


def public_names(owner: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """The public classes, functions and methods of a file."""
    for node in ast.iter_child_nodes(owner):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_names(node, f"{prefix}{node.name}.")


def documentation_faults(name: str, source: str) -> list[str]:
    """A file, a public name or a config field without a sentence of its own."""
    tree = ast.parse(source)
    faults = (
        []
        if ast.get_docstring(tree) or not tree.body
        else [f"{name} does not open with a sentence"]
    )
    for public, node in public_names(tree):
        if not ast.get_docstring(node):
            faults.append(f"{name}: {public} has no docstring")
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Section")):
            faults += [f"{name}: {public}.{field} has no sentence" for field in bare_fields(node)]
    return faults


def bare_fields(node: ast.ClassDef) -> list[str]:
    """Fields that no string follows; a field that is a section has the sentence of its class."""
    bare = []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        kind = ast.unparse(field.annotation)
        if kind.endswith(("Config", "Section")) or "ClassVar" in kind:
            continue
        said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if not said:
            bare.append(ast.unparse(field.target))
    return bare


def text_files() -> list[Path]:
    """Every source, configuration and text file of the repository but this one."""
    endings = {".py", ".toml", ".md", ".sh", ".sbatch", ".yaml", ".txt"}
    hidden = [ROOT / ".github", ROOT / ".ci", ROOT / ".pre-commit-config.yaml"]
    tops = [ROOT / entry for entry in sorted(ROOT_ENTRIES)] + hidden
    files = [p for top in tops for p in ([top] if top.is_file() else sorted(top.rglob("*")))]
    chosen = [p for p in files if p.is_file() and (p.suffix in endings or p.parent.name == ".ci")]
    return [p for p in chosen if p != Path(__file__)]


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_imports_point_one_way(path: Path) -> None:
    faults = import_faults(dotted(path), path.read_text())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=dotted)
def test_files_and_functions_stay_short(path: Path) -> None:
    faults = size_faults(dotted(path), path.read_text())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_every_public_name_and_config_field_is_documented(path: Path) -> None:
    faults = documentation_faults(dotted(path), path.read_text())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("importer", "source", "fault"),
    [
        ("parallelisms.fsdp", "from models.decoder import DecoderLM", "models.decoder"),
        ("parallelisms.fsdp", "import engine.loop", "engine.loop"),
        (
            "models.families.llama3",
            "from torch.distributed.tensor import DTensor",
            "torch.distributed",
        ),
        ("models.decoder", "from torch import distributed", "torch.distributed"),
        ("models.decoder", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("models.decoder", "import os\nos.environ['RANK']", "os.environ"),
        ("models.plan", "import torch", "standard library"),
        ("models.registry", "import torch", "standard library"),
        ("engine.data.loader", "from parallelisms.mesh import ParallelDims", "parallelisms.mesh"),
        (
            "engine.objectives.pretrain",
            "from engine.data.loader import train_batches",
            "engine.data.loader",
        ),
        ("engine.loop", "from .step import train_step", "relative import"),
        ("train", "from models.registry import load_family", "models.registry"),
    ],
)
def test_an_import_against_the_direction_is_caught(importer: str, source: str, fault: str) -> None:
    assert any(fault in line for line in import_faults(importer, source))


def test_long_files_long_functions_and_bare_names_are_caught() -> None:
    assert size_faults("m", "x = 1\n" * 401)
    assert size_faults("m", "def f():\n" + "    x = 1\n" * 60)
    assert not size_faults("m", "def f():\n" + "    x = 1\n" * 59)
    assert len(documentation_faults("m", "class AConfig:\n    x: int = 1\n")) == 3
    assert not documentation_faults(
        "m", '"""M."""\nclass AConfig:\n    """A."""\n    x: int\n    """X."""\n'
    )


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {
        dotted(path): imported(path.read_text(), run_time_only=True) & MODULES for path in SOURCES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' -> '.join(error.args[1])}")


def test_each_optional_package_is_imported_in_one_file() -> None:
    importers: dict[str, set[str]] = {}
    for path in SOURCES:
        for name in {name.split(".")[0] for name in imported(path.read_text())}:
            if name in OPTIONAL_PACKAGES:
                importers.setdefault(name, set()).add(dotted(path))
    scattered = {name: files for name, files in importers.items() if len(files) > 1}
    assert not scattered


def test_config_dataclasses_keep_their_field_types() -> None:
    """The command line reads field types; postponed annotations would turn them into strings."""
    postponed = [
        dotted(path)
        for path in SOURCES
        if "from __future__ import annotations" in path.read_text()
        and any(
            name.endswith(("Config", "Section"))
            for name, _ in public_names(ast.parse(path.read_text()))
        )
    ]
    assert not postponed


def test_the_listed_packages_are_those_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(dotted(p) for p in SOURCES if p.name == "__init__.py")


def test_the_root_holds_only_its_fixed_entries() -> None:
    entries = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    entries = {name for name in entries - MADE_BY_TOOLS if not name.endswith(".egg-info")}
    assert entries <= ROOT_ENTRIES, f"not expected at the root: {sorted(entries - ROOT_ENTRIES)}"


def test_no_file_holds_a_note_of_unfinished_work() -> None:
    marks = ("TODO", "FIXME", "XXX", "NotImplementedError(")
    left = [
        f"{p.relative_to(ROOT)}: {m}" for p in text_files() for m in marks if m in p.read_text()
    ]
    assert not left, "\n".join(left)


def run_python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_engine_is_quick_and_creates_nothing(tmp_path: Path) -> None:
    code = "import time; t = time.perf_counter(); import engine; print(time.perf_counter() - t)"
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 3.0
    assert not list(tmp_path.iterdir())


def test_every_module_imports_without_optional_packages_and_starts_nothing(tmp_path: Path) -> None:
    modules = sorted(n for n in MODULES - OF_TRITON if n.split(".")[0] in PACKAGES)
    code = f"""
import importlib, os, sys
for name in {OPTIONAL_PACKAGES}:
    sys.modules[name] = None  # importing it raises ImportError
before = dict(os.environ)
for name in {modules}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
changed = {{name for name, value in os.environ.items() if before.get(name) != value}}
changed -= {{"TORCHINDUCTOR_CACHE_DIR"}}  # set by torch when inductor is imported
assert not changed, changed
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir()), "importing created files"


def test_optional_packages_are_none_of_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {line.split(">")[0].replace("-", "_") for line in project["dependencies"]}
    assert not required & set(OPTIONAL_PACKAGES)
    assert importlib.util.find_spec("models") is not None
