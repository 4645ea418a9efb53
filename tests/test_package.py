"""The package as a whole: what it imports, what it ships, what it says about itself, which part may use which."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxmerge
from tests.public import public_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxmerge"

# The one-way street of docs/design.md: what each part may import besides itself.
MAY_IMPORT = {
    "errors": set(),
    "trees": {"errors"},
    "checkpoints": {"errors", "trees"},
    "methods": {"errors", "trees"},
    "streaming": {"errors", "trees", "checkpoints", "methods"},
    "learning": {"errors", "trees", "methods"},
    "plots": set(),
    "cli": {"errors", "trees", "checkpoints", "methods", "streaming", "plots"},
    "api": {"errors", "trees", "checkpoints", "methods", "streaming", "learning", "plots", "cli"},
    "__main__": {"cli"},
    "__init__": {"api"},
}


def third_party_modules(code: str) -> set[str]:
    """The top-level packages outside the standard library that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split()) - sys.stdlib_module_names


def test_import_loads_nothing():
    """So that the command line can answer before JAX is loaded."""
    assert third_party_modules("import jaxmerge") <= {"jaxmerge"} | third_party_modules("")


def test_first_use_loads_nothing_heavy_beside_jax():
    added = third_party_modules("import jaxmerge; jaxmerge.merge") - third_party_modules("import jax")
    assert added <= {"jaxmerge", "jaxtyping", "wadler_lindig"}


def imported_parts(path: Path) -> Iterator[str]:
    """The parts of the package (`trees` for `jaxmerge.trees.lazy`, "" for the package itself) that a file imports."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (above + (node.module or "")).rstrip(".")
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "jaxmerge" else [module]
        else:
            continue
        for module in modules:
            top, _, rest = module.partition(".")
            if top == "jaxmerge":
                yield rest.split(".")[0]


def test_parts_import_only_what_lies_below_them():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        wrong += [
            f"{path.relative_to(ROOT)} imports {other or 'the whole package'}"
            for other in imported_parts(path)
            if other != part and other not in MAY_IMPORT[part]
        ]
    assert not wrong


def test_version():
    assert jaxmerge.__version__ == importlib.metadata.version("jaxmerge")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_only_that(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".typed")}
    assert shipped == source
    assert "jaxmerge/py.typed" in shipped


def test_wheel_puts_no_upper_bound_on_anything(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    assert any(requirement.startswith("jax") for requirement in required)
    assert not [requirement for requirement in required if re.search(r"<|==|~=", requirement.partition(";")[0])]


@pytest.mark.parametrize(("name", "value"), public_names().items())
def test_public_name_is_documented(name, value):
    doc = inspect.getdoc(value) or ""
    assert doc, f"{name} has no docstring"
    if inspect.isfunction(value):
        explained = set(re.findall(r"^ +\*?(\w+): ", doc, re.MULTILINE))
        explained |= {
            word for others in re.findall(r"^ +((?:\w+, )+\w+): ", doc, re.MULTILINE) for word in others.split(", ")
        }
        for other in re.findall(r"(?:arguments as for|Args are those of) `(\w+)`", doc):
            explained |= set(inspect.signature(getattr(jaxmerge, other)).parameters)
        missing = set(inspect.signature(value).parameters) - explained
        assert not missing, f"{name} does not explain {missing}"
    elif inspect.isclass(value):
        silent = [
            member
            for member, attribute in vars(value).items()
            if not member.startswith("_")
            and (inspect.isfunction(attribute) or isinstance(attribute, property | classmethod | staticmethod))
            and not inspect.getdoc(getattr(value, member))
        ]
        assert not silent, f"{name} has members without a docstring: {silent}"


def test_no_file_knows_the_machine_it_was_written_on():
    machine = re.compile(r"(?<![\w./-])/(?:home|root|tmp|work|Users)/\w")
    folders = [ROOT / name for name in ("jaxmerge", "examples", "tests", "benchmarks", "docs", ".ci")]
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    texts = {".py", ".md", ".toml", ".ipynb", ".json", ".yaml", ".yml", ""}
    generated = {"__pycache__", "_build", ".ipynb_checkpoints"}
    assert not [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in texts and not generated & set(path.parts) and machine.search(path.read_text())
    ]
