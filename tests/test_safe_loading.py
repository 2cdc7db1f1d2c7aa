"""No file that is read can run code."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = [
    path for name in ("src", "training", "benchmarks", "spaces") for path in sorted((ROOT / name).rglob("*.py"))
]


def test_nothing_that_could_run_code_is_loaded():
    """Every torch.load says weights_only=True: older torch, and an environment variable, have another default."""
    wrong, loads = [], 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = any(name.split(".")[0] in RUN_CODE for name in imported)
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                bad |= bool(keywords.get("allow_pickle")) or keywords.get("weights_only", True) is not True
                if ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
                    loads += 1
                    bad |= "weights_only" not in keywords
            if bad:
                wrong.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)[:80]}")
    assert loads and not wrong, wrong
