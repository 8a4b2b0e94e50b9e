"""The house: a total order of packages, no import circle, few modules at the root, no long file."""

import ast
from pathlib import Path

import lmeraser_jax

ROOT = Path(lmeraser_jax.__file__).parent
ORDER = ("errors", "hashing", "progress", "interrupt", "config", "data", "storage", "models", "training")
ORDER += ("unlearning", "evaluation", "service", "experiments", "cli")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere, in functions too."""
    imported = set()
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in FILES else node.module for name in names}
    return {name for name in imported if name.partition(".")[0] == "lmeraser_jax"}


IMPORTS = {module: imports_of(module) for module in FILES}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_a_package_imports_only_what_stands_left_of_it():
    wrong = []
    for module, imported in IMPORTS.items():
        package = package_of(module)
        if package:  # the root itself only has the public names, which it imports when they are used
            allowed = {"", *ORDER[: ORDER.index(package) + 1]}
            wrong += [f"{module} imports {name}" for name in imported if package_of(name) not in allowed]
    assert not wrong


def test_there_is_no_import_circle():
    checked: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path, module))}"
        if module not in checked:
            for imported in sorted(IMPORTS[module] & FILES.keys()):
                visit(imported, (*path, module))
            checked.add(module)

    for module in FILES:
        visit(module, ())


def test_the_root_holds_the_foundations_only():
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", *ORDER[: ORDER.index("config")]}


def test_no_file_is_longer_than_400_lines():
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > 400}
