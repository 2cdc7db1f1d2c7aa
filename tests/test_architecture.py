"""
The order of the folders, checked from the imports themselves.

A folder of the package imports only from the folders before it. Within model/ a file imports only what the copy in a
Hub repository can import too.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "hf_efficientsam"
NAME = PACKAGE.name
FOLDERS = ["model", "inference", "export", "training", "demo", "serve", "cli"]  # each may import from those before it

TRAINING_BASE = {"engine", "data"}  # for every task
# What a task's folder may import of another's, and why.
TASKS_MAY_IMPORT = {
    ("detection", "masks"): "COCO's average precision is that of masks",
}

# A Hub repository carries the files of model/, and transformers copies those named in `from .x import Y`.
MODEL_MAY_IMPORT = {"torch", "numpy", "PIL", "transformers"}
MODEL_MAY_TRY_TO_IMPORT = {"pillow_heif"}  # within `try`, where transformers does not ask for it
MODEL_MAY_IMPORT_FROM_HUB = "huggingface_hub.dataclasses"


def modules(package: Path) -> dict[str, ast.Module]:
    """Dotted names, `__init__` included as the name of its folder, and their syntax trees."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports_of(name: str, tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """What a module imports, anywhere in it, as absolute dotted names: of modules of the package as those modules."""
    found = set()
    is_folder = any(other.startswith(f"{name}.") for other in known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: len(name.split(".")) - node.level + is_folder] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of a folder, or a name of a module
                found.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module)
    return found


def dependencies(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For each module of the package, which others it imports."""
    return {name: imports_of(name, tree, trees) & trees.keys() for name, tree in trees.items()}


def names_from_the_package(tree: ast.Module) -> set[str]:
    """Names that a module takes from the package's `__init__`."""
    taken = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == NAME and not node.level:
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names if alias.name == NAME}
    return taken


def arrows_upwards(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a folder from one that is not before it."""
    wrong = []
    for importer, imported in arrows(graph):
        if importer.count(".") and imported.count("."):
            folder, other = importer.split(".")[1], imported.split(".")[1]
            if FOLDERS.index(other) > FOLDERS.index(folder):
                wrong.append(f"{importer} imports {imported}")
    return wrong


def arrows_between_tasks(graph: dict[str, set[str]]) -> list[str]:
    """Imports inside training/ of a task from another one, or of engine and data from a task."""
    wrong = []
    for importer, imported in arrows(graph):
        folder, other = part_of_training(importer), part_of_training(imported)
        if not folder or not other or folder == other or other in TRAINING_BASE:
            continue
        if (folder, other) not in TASKS_MAY_IMPORT:
            wrong.append(f"{importer} imports {imported}")
    return wrong


def arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [(importer, imported) for importer in graph for imported in sorted(graph[importer])]


def part_of_training(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "training" else None


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of an import cycle, or none. Packages' `__init__` files without imports are no part of one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def foreign_to_model(tree: ast.Module) -> list[str]:
    """Imports of a file of model/ that its copy in a Hub repository could not make."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wrong += [alias.name for alias in node.names if not may_be_in_model(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                wrong.append(ast.unparse(node))  # transformers follows `from .x import Y` alone
        elif isinstance(node, ast.ImportFrom) and not may_be_in_model(node.module):
            wrong.append(node.module)
    return wrong


def may_be_in_model(module: str) -> bool:
    top = module.split(".")[0]
    return (
        top in sys.stdlib_module_names
        or top in MODEL_MAY_IMPORT | MODEL_MAY_TRY_TO_IMPORT
        or module == MODEL_MAY_IMPORT_FROM_HUB
    )


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(FOLDERS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


def test_folders_import_only_from_those_before_them():
    assert arrows_upwards(dependencies(modules(PACKAGE))) == []


def test_tasks_of_training_stand_alone():
    assert arrows_between_tasks(dependencies(modules(PACKAGE))) == []


def test_exceptions_between_tasks_are_in_use():
    used = {tuple(map(part_of_training, arrow)) for arrow in arrows(dependencies(modules(PACKAGE)))}
    assert TASKS_MAY_IMPORT.keys() <= used


def test_no_imports_in_a_circle():
    trees = modules(PACKAGE)
    graph = dependencies({name: tree for name, tree in trees.items() if name != NAME})  # `__init__` imports them all
    assert cycle_in(graph) == []


def test_inside_the_package_only_the_version_is_taken_from_its_public_names():
    wrong = {name: names_from_the_package(tree) - {"__version__"} for name, tree in modules(PACKAGE).items()}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_model_imports_what_its_copy_on_the_hub_can_import():
    wrong = {
        name: foreign_to_model(tree) for name, tree in modules(PACKAGE).items() if name.startswith(f"{NAME}.model.")
    }
    assert wrong and {name: imports for name, imports in wrong.items() if imports} == {}


def test_the_rules_notice_what_breaks_them():
    def graph(**imports: str) -> dict[str, set[str]]:
        trees = {f"{NAME}.{name.replace('__', '.')}": ast.parse(text) for name, text in imports.items()}
        return dependencies(trees)

    below = graph(
        model__a="", inference__b="def later():\n    from ..model import a\n    from hf_efficientsam.model.a import x"
    )
    assert arrows_upwards(below) == [] and below[f"{NAME}.inference.b"] == {f"{NAME}.model.a"}
    above = graph(model__a="def later():\n    from hf_efficientsam.cli import b", cli__b="")
    assert arrows_upwards(above) == [f"{NAME}.model.a imports {NAME}.cli.b"]

    tasks = graph(training__sami__a="from hf_efficientsam.training.masks.b import x", training__masks__b="")
    assert len(arrows_between_tasks(tasks)) == 1
    base = graph(training__engine__a="import hf_efficientsam.training.masks.b", training__masks__b="")
    assert len(arrows_between_tasks(base)) == 1
    allowed = graph(training__masks__a="from hf_efficientsam.training.data.b import x", training__data__b="")
    assert arrows_between_tasks(allowed) == []

    assert cycle_in(graph(model__a="from .b import x", model__b="from .c import x", model__c="from . import a"))
    assert not cycle_in(graph(model__a="from .b import x", model__b=""))

    assert names_from_the_package(ast.parse("from hf_efficientsam import EfficientSamModel, __version__")) == {
        "EfficientSamModel",
        "__version__",
    }
    assert names_from_the_package(ast.parse("import hf_efficientsam")) == {NAME}
    for allowed in ("import torch.nn", "from transformers.utils import x", "import os", "from .x import Y"):
        assert foreign_to_model(ast.parse(allowed)) == [], allowed
    for refused in (
        "from ..inference import x",
        "from . import x",
        "from .x.y import Z",
        "import scipy",
        "from hf_efficientsam.model.x import Y",
        "from huggingface_hub import ModelCard",
        "def later():\n    import pycocotools",
    ):
        assert len(foreign_to_model(ast.parse(refused))) == 1, refused
