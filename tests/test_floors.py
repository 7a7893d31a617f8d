"""An import only goes down: kernels < data < models < steps < the loop < the command."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# The lowest floor first; a module belongs to the longest name that it starts with.
FLOORS = (
    ("kernels",),
    (
        "jaxpt",
        "jaxpt.errors",
        "jaxpt.duration",
        "jaxpt.files",
        "jaxpt.state",
        "jaxpt.paths",
        "jaxpt.migrations",
        "jaxpt.config",
        "jaxpt.guard",
    ),
    ("jaxpt.rollcall", "jaxpt.cli_flags", "jaxpt.signals"),
    ("jaxpt.distributed",),
    ("jaxpt.maintenance",),
    (
        "jaxpt.mesh",
        "jaxpt.hardware",
        "jaxpt.environment",
        "jaxpt.determinism",
        "jaxpt.hlo",
        "jaxpt.operations",
    ),
    ("jaxpt.gather",),
    ("jaxpt.weights", "jaxpt.data"),
    ("jaxpt.optimizers",),
    ("jaxpt.models", "jaxpt.objectives", "jaxpt.sparsity", "jaxpt.growth", "jaxpt.interop"),
    (
        "jaxpt.steps",
        "jaxpt.layerwise",
        "jaxpt.integrity",
        "jaxpt.checkpoint",
        "jaxpt.sampling",
        "jaxpt.decoding",
        "jaxpt.filling",
    ),
    ("jaxpt.evaluation", "jaxpt.meter", "jaxpt.console", "jaxpt.writers", "jaxpt.status"),
    ("jaxpt.report", "jaxpt.monitor"),
    ("jaxpt.run",),
    ("jaxpt.folder", "jaxpt.checks", "jaxpt.program", "jaxpt.generator"),
    ("jaxpt.restoring",),
    ("jaxpt.progress",),
    ("jaxpt.scoring", "jaxpt.expected"),
    (
        "jaxpt.loading",
        "jaxpt.start",
        "jaxpt.samples",
        "jaxpt.summary",
        "jaxpt.checkpoint_commands",
        "jaxpt.due",
    ),
    ("jaxpt.answers",),
    ("jaxpt.examine", "jaxpt.interop.lm_eval"),
    ("jaxpt.checkups", "jaxpt.watch", "jaxpt.shortage"),
    (
        "jaxpt.train",
        "jaxpt.evaluate",
        "jaxpt.generate",
        "jaxpt.bench",
        "jaxpt.doctor",
        "jaxpt.plan",
        "jaxpt.launch",
    ),
    ("jaxpt.plan_command", "jaxpt.interop_commands", "jaxpt.merge"),
    ("jaxpt.cli", "jaxpt.__main__", "experiments", "configs"),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# What runs by itself stands above what it shows.
EXCEPTIONS = {
    ("jaxpt.data.show", "jaxpt.run"),
    ("jaxpt.data.show", "jaxpt.config"),
    ("jaxpt.data.show", "jaxpt.objectives.lengths"),
    ("jaxpt.data.build_display", "jaxpt.console"),
}


def modules():
    for top in ("kernels", "jaxpt", "experiments", "configs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def floor(module: str) -> int | None:
    """The floor of the longest known name that holds the module; None where nobody placed it."""
    name = module
    while name not in FLOOR or (name == "jaxpt" and module != "jaxpt"):
        name, _, last = name.rpartition(".")
        if not last or not name:
            return None
    return FLOOR[name]


def imports(path: pathlib.Path, package: str):
    """Modules of ours that a file imports, but for those that only a type checker reads."""
    tree = ast.parse(path.read_text())
    known = {name for name, _ in modules()}
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n in known else node.module for n in names]
        else:
            continue
        yield from (
            n for n in names if n.split(".")[0] in ("kernels", "jaxpt", "experiments", "configs")
        )


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports_only_go_down(module, path):
    here = floor(module)
    assert here is not None, f"{module} stands on no floor: add it to FLOORS in this file"
    for name in imports(path, module):
        there = floor(name)
        assert there is not None, f"{module} imports {name}, which stands on no floor"
        allowed = any(module == m and name.startswith(n) for m, n in EXCEPTIONS)
        # jaxpt/__init__.py names things of every floor, but imports them only when asked for.
        assert there <= here or allowed or module == "jaxpt", (
            f"{module} (floor {here}) imports {name} (floor {there})"
        )


def test_kernels_stand_on_jax_alone():
    for module, path in modules():
        if module.split(".")[0] != "kernels":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top in ("kernels", "jax", "numpy") or top in sys.stdlib_module_names, (
                    f"{module} imports {name}"
                )
