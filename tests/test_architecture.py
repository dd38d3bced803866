"""Imports point down, `import hess` stays light, and importing changes nothing global."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "hess"

# A module may import from its own layer's line and from those below it.
LAYERS = [
    {"errors", "files", "heap"},
    {"attention", "geometry", "allocation"},
    {"sensitivity", "policies", "models", "datasets", "export"},
    {
        *("calibration", "sparsification", "transforms", "reconstruction"),
        *("evaluation", "training", "footprint", "guard"),
    },
    {"viz", "bench"},
    {"reproduce"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Within a layer packages do not know each other, but for these.
SIDEWAYS = {
    ("attention", "allocation"): True,
    ("sensitivity", "models"): True,
    ("sensitivity", "datasets"): True,
    ("policies", "sensitivity"): True,
    ("policies", "models"): True,
    ("calibration", "sparsification"): True,
    ("guard", "sparsification"): True,
    ("transforms", "sparsification"): True,
    ("evaluation", "sparsification"): True,
    ("evaluation", "transforms"): True,
    ("training", "evaluation"): True,
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hess."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hess."):
                    yield alias.name.split(".")[1]


def test_every_module_belongs_to_a_layer():
    found = {p.stem if p.suffix == ".py" else p.name for p in SOURCE.iterdir()}
    found -= {"__init__", "__pycache__", "assets", "py.typed"}
    assert found == set(LEVEL)


def test_imports_point_down():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for there in imports_of(path):
            down = LEVEL[there] < LEVEL[here]
            if not (there == here or down or SIDEWAYS.get((here, there), False)):
                wrong.append(f"{path.relative_to(SOURCE)} imports hess.{there}")
    assert not wrong


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_is_light():
    code = "import sys, hess; print(*(m.split('.')[0] for m in sys.modules))"
    loaded = set(run_python(code).split())
    assert not loaded & {"torch", "numpy", "scipy", "matplotlib", "faiss", "small_gicp", "PIL"}


def test_importing_everything_changes_no_global_of_torch():
    modules = [
        ".".join(("hess", *p.relative_to(SOURCE).with_suffix("").parts))
        for p in SOURCE.rglob("*.py")
        if p.stem != "__init__"
    ]
    code = f"""
import importlib, torch
def flags():
    return (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.initial_seed(), torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().sum().item())
before = flags()
for module in {modules!r}:
    importlib.import_module(module)
print(before == flags())
"""
    assert run_python(code).strip() == "True"


def test_no_module_is_named_like_a_public_function():
    """``hess.calibrate`` must be the function: a module of that name would shadow it."""
    import hess

    modules = {p.stem if p.suffix == ".py" else p.name for p in SOURCE.iterdir()}
    assert not modules & (set(hess.__all__) - {"datasets", "policies"})
