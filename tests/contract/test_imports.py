"""The dependency direction and what may be imported where, read from the source with `ast`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "deploycc"
FILES = sorted(PACKAGE.rglob("*.py"))

# layer → the layers it may import besides itself
ALLOWED = {
    "errors": set(),
    "runtime": {"errors"},
    "core": {"errors", "runtime"},
    "forms": {"errors", "runtime", "core"},
    "sources": {"errors", "runtime", "core", "forms"},
    "passes": {"errors", "runtime", "core", "forms"},
    "backends": {"errors", "runtime", "core", "forms"},
    "bench": {"errors", "runtime", "core", "forms"},
    "package": {"errors", "runtime", "core", "forms", "bench"},
    "remote": {"errors", "runtime", "core", "bench"},
    "demo": {"errors", "runtime", "core", "forms", "sources"},
}
HEAVY = {
    "torch",
    "torchvision",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "torchmetrics",
    "sklearn",
    "matplotlib",
    "PIL",
    "safetensors",
}
EAGER_LAYERS = {"bench"}  # imported only by commands that measure
OVER_TORCH = (
    "_torch_ao",
    "_onnx_torch",
    "_onnx_program",
    "_fake_quant",
    "_pt2e",
    "_means",
)  # private modules of classes over torch's, themselves imported inside functions


def layer_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(tree: ast.Module, *, top_level_only: bool = False):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal_layers(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(ast.parse(path.read_text())))
    found = {parts[1] for parts in names if parts[0] == "deploycc" and len(parts) > 1}
    return found - {layer_of(path), "__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrow(path):
    layer = layer_of(path)
    if layer not in ALLOWED:
        return  # the drivers and the command line may import anything
    assert internal_layers(path) <= ALLOWED[layer]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_heavy_is_imported_before_it_is_used(path):
    if layer_of(path) in EAGER_LAYERS or path.name.startswith(OVER_TORCH):
        return
    found = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), top_level_only=True)}
    assert not found & HEAVY


@pytest.mark.parametrize(
    "folder", ["passes", "backends", "sources/models", "sources/datasets", "forms", "package/runners", "emulate/sessions"]
)
def test_plug_ins_do_not_import_each_other(folder):
    for path in sorted((PACKAGE / folder).glob("*.py")):
        prefix = f"deploycc.{folder.replace('/', '.')}."
        siblings = {name.removeprefix(prefix).split(".")[0] for name in imports(ast.parse(path.read_text())) if name.startswith(prefix)}
        public = {name for name in siblings if not name.startswith("_")}
        if folder != "forms":  # a program is run through its module
            assert not public, f"{path.name} imports the plug-in {public}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_lines_print_or_exit(path):
    if path.relative_to(PACKAGE).as_posix() in ("cli.py", "runtime/__main__.py") or layer_of(path) == "commands":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "quit", "input"), f"line {node.lineno}"


def test_no_python_file_names_a_target():
    names = {path.stem for path in (ROOT / "targets").glob("*.toml")}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.Subscript | ast.Call):
                values = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)}
                assert not values & names, f"{path} line {node.lineno} decides by a target's name: {values & names}"


def run_without(modules, code):
    """Run `code` in a new process where importing any of `modules` fails."""
    block = (
        "import sys\n"
        f"blocked = {sorted(modules)!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_core_imports_with_neither_torch_nor_onnx_installed():
    modules = [f"deploycc.core.{path.stem}" for path in (PACKAGE / "core").glob("*.py") if path.stem != "__init__"]
    result = run_without(HEAVY, "".join(f"import {module}\n" for module in sorted(modules)))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [["--help"], ["compile", "--help"], ["targets"], ["targets", "x86-onnxruntime"], ["passes"], ["backends"], ["sources"], ["devices"]])  # fmt: skip
def test_help_and_lists_never_import_torch(command):
    code = f"import sys\nsys.argv = ['deploycc', *{command!r}]\nfrom deploycc.cli import main\nmain()\n"
    result = run_without({"torch", "torchvision", "onnx", "onnxruntime"}, code)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 100
