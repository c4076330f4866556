"""Puts small faults into the code, one at a time, and tells which of them the tests notice.

    python scripts/mutate.py --seed 1 --count 80 --out mutants.json
    python scripts/mutate.py --again mutants.json --out mutants.json      # the survivors once more

Faults are drawn at random, from each file in proportion to the square root of how many it could have. Each is put
into a copy of the tree, in which the tests of its file run up to the first failure. The list of all is JSON.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

EQUATIONS, MODEL, ROUTER = (f"tests/model/test_{name}.py" for name in ("equations", "model", "router"))
IMPLS, DISPATCH = "tests/model/test_attend.py", "tests/parallel/test_dispatch.py"
LOSSES, STEP = "tests/training/test_losses.py", "tests/training/test_step.py"
TESTS = {  # arguments of pytest: the tests that should notice, the fastest first
    "dsv3_jax/model/attention.py": f"{EQUATIONS} {IMPLS} {MODEL} -k 'equations or layer_cont or (v3 and decoding)'",
    "dsv3_jax/model/attend.py": f"{IMPLS} -k 'right_aligned or plain_att or layer_cont or refus or gradient or _mesh'",
    "dsv3_jax/model/block.py": EQUATIONS,
    "dsv3_jax/model/linear.py": f"{EQUATIONS} {MODEL} {STEP} -k 'equations or bfloat16 or (step and gradient)'",
    "dsv3_jax/model/moe.py": f"{EQUATIONS} {ROUTER} tests/inference/test_expert_placement.py",
    "dsv3_jax/model/mtp.py": EQUATIONS,
    "dsv3_jax/model/norm.py": f"{EQUATIONS} {STEP}::test_gradient",
    "dsv3_jax/model/remat.py": EQUATIONS,
    "dsv3_jax/model/rope.py": f"tests/model/test_rope.py {EQUATIONS}",
    "dsv3_jax/model/router.py": f"{EQUATIONS} {ROUTER} -k 'not drop'",
    "dsv3_jax/model/transformer.py": f"{EQUATIONS} {MODEL} -k 'equations or refused or holds or (v3 and decoding)'",
    "dsv3_jax/training/losses.py": f"{LOSSES}::test_sums_are_the_equations {LOSSES} -k 'not gradient'",
    "dsv3_jax/training/step.py": f"{LOSSES} {STEP} -k 'metrics or objective or (step and gradient) or microb or bias'",
    "dsv3_jax/parallel/rows.py": f"{ROUTER} -k drop",
    "dsv3_jax/parallel/dispatch.py": f"{DISPATCH} tests/parallel/test_wire.py -k 'not gathers'",
}

OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.And: "or", ast.Or: "and",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
TWINS = "sum mean|min max|minimum maximum|floor ceil|cos sin|any all|argmax argmin|zeros ones|zeros_like ones_like"
NAMES = {a: b for pair in TWINS.split("|") for a, b in (pair.split(), reversed(pair.split()))}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old` at a line and column of a file becomes `new`; `text` is the line, to find it when others have moved it."""

    file: str
    line: int
    column: int
    old: str
    new: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.old} -> {self.new}  in  {self.text}"


def mutants_of(file: str) -> list[Mutant]:
    """All faults of a file: a wrong operator, number, condition or function, or an option left out."""
    source = (ROOT / file).read_text()
    lines = source.splitlines(keepends=True)
    start_of = [sum(map(len, lines[:i])) for i in range(len(lines))]  # the code is ASCII: columns are characters
    begin = lambda node: start_of[node.lineno - 1] + node.col_offset
    end = lambda node: start_of[node.end_lineno - 1] + node.end_col_offset
    found: list[Mutant] = []

    def add(a: int, b: int, new: str) -> None:
        line = source.count("\n", 0, a)
        if source[a:b] != new:
            found.append(Mutant(file, line + 1, a - start_of[line], source[a:b], new, lines[line].strip()))

    def operator(left: ast.expr, right: ast.expr, kind: ast.AST) -> None:
        between, new = source[end(left) : begin(right)], OPERATORS.get(type(kind))
        symbol = between.strip(" ()\n")
        if new and symbol and "\n" not in symbol and "#" not in symbol:
            at = end(left) + between.index(symbol)
            add(at, at + len(symbol), new)

    def visit(node: ast.AST) -> None:
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Assert():
                return  # texts of errors
            case ast.FunctionDef(args=arguments, body=body):  # without annotations and decorators
                defaults = [d for d in arguments.defaults + arguments.kw_defaults if d]
                for child in defaults + body:
                    visit(child)
                return
            case ast.ClassDef(body=body):
                for child in body:
                    visit(child)
                return
            case ast.AnnAssign():
                visit(node.value) if node.value else None
                return
            case ast.BinOp(left=left, right=right, op=op):
                operator(left, right, op)
            case ast.AugAssign(target=left, value=right, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op):
                at = source.index("=", end(left)) - 1
                add(at, at + 1, OPERATORS[type(op)])
            case ast.BoolOp(values=[left, right, *_], op=op):
                operator(left, right, op)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                operator(left, right, op)
            case ast.UnaryOp(op=ast.Not() | ast.USub() as op):
                add(begin(node), begin(node) + (4 if isinstance(op, ast.Not) else 1), "")
            case ast.If(test=test) | ast.IfExp(test=test):
                add(begin(test), end(test), f"(not ({source[begin(test) : end(test)]}))")
            case ast.Constant(value=bool(value)):
                add(begin(node), end(node), str(not value))
            case ast.Constant(value=int() | float() as value):
                add(begin(node), end(node), str(value + 1 if isinstance(value, int) else 2 * value or 1.0))
            case ast.Attribute(attr=name) if name in NAMES:
                add(end(node) - len(name), end(node), NAMES[name])
            case ast.Call(keywords=keywords):
                for k in (k for k in keywords if k.arg):
                    after = source[end(k) :]
                    add(begin(k), end(k) + (len(after) - len(after.lstrip(", "))), "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def draw(files: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` faults or, by rounding, a few more or less."""
    pools = [mutants_of(file) for file in files]
    share = count / sum(len(pool) ** 0.5 for pool in pools)
    rng = random.Random(seed)
    return [m for pool in pools for m in rng.sample(pool, min(len(pool), round(share * len(pool) ** 0.5)))]


def put(mutant: Mutant, source: str) -> str:
    """The source with the fault in it."""
    lines = source.splitlines(keepends=True)
    at = sum(map(len, lines[: mutant.line - 1])) + mutant.column
    assert source.startswith(mutant.old, at)
    return source[:at] + mutant.new + source[at + len(mutant.old) :]


def find_again(mutant: Mutant) -> Mutant | None:
    """The same fault in the present source, where its line may stand elsewhere; None if it is gone."""
    what = lambda m: (m.old, m.new, m.text, m.column)
    same = [m for m in mutants_of(mutant.file) if what(m) == what(mutant)]
    return min(same, key=lambda m: abs(m.line - mutant.line), default=None)


def copy_tree(to: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def prepare(tree: Path) -> None:
    """Imports what takes long, the project's own code excepted, as the tests would."""
    sys.dont_write_bytecode = True  # a fault of the same size within a second would pass for the code before it
    os.environ |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "400"}  # the latter for whole names of tests
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tree / "compiled"))
    for name in ("jax.experimental.pallas.tpu", "jax.experimental.pallas.mosaic_gpu", "flax.linen", "optax", "chex"):
        importlib.import_module(name)


def run_tests(tests: str, tree: Path, limit: int) -> tuple[bool, str]:
    """Whether tests pass in `tree`, and the first failure. In a fork: what takes long to import is there already."""
    log = tree / "mutant.log"
    child = os.fork()
    if not child:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(tree)
        signal.alarm(limit)  # ends the process, whatever it is doing
        os._exit(pytest.main(["-x", "--tb=no", "-p", "no:cacheprovider", *shlex.split(tests)]))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return False, f"not done after {limit} s" if number == signal.SIGALRM else f"ended by signal {number}"
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return status == 0, (failed or [line for line in lines if line] or ["no output"])[0 if failed else -1]


def check_noticing(results: list[dict], tree: Path, limit: int) -> None:
    """The tests that failed with a fault must pass without one."""
    named = (e["by"].partition(" ") for e in results)
    failed = {rest.split(" - ")[0] for kind, _, rest in named if kind in ("FAILED", "ERROR")}
    if failed:
        passes, by = run_tests(shlex.join(sorted(failed)), tree, limit)
        print(f"{len(failed)} tests noticed faults; without one, " + ("all pass" if passes else f"there fails {by}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=80, help="faults in all")
    parser.add_argument("--files", nargs="*", default=list(TESTS), help="by default all of which tests are listed")
    parser.add_argument("--limit", type=int, default=600, help="seconds for the tests of one fault")
    parser.add_argument("--out", type=Path, required=True, help="JSON list of faults and what became of them")
    parser.add_argument("--again", type=Path, help="a list whose survivors to try, instead of drawing")
    parser.add_argument("--list", action="store_true", help="only show what would be tried")
    args = parser.parse_args()

    results: list[dict] = []
    if args.again:
        entries = json.loads(args.again.read_text())
        results = [e for e in entries if e["noticed"]]
        fields = [f.name for f in dataclasses.fields(Mutant)]
        drawn = [find_again(Mutant(**{f: e[f] for f in fields})) for e in entries if not e["noticed"]]
        drawn = [m for m in drawn if m is not None]
    else:
        drawn = draw(args.files, args.count, args.seed)
    print(f"seed {args.seed}: {len(drawn)} faults")
    if args.list:
        print(*drawn, sep="\n")
        return

    with tempfile.TemporaryDirectory(prefix="mutants_") as directory:
        tree = Path(directory)
        copy_tree(tree)
        prepare(tree)
        for i, mutant in enumerate(drawn, 1):
            source = (ROOT / mutant.file).read_text()
            (tree / mutant.file).write_text(put(mutant, source))
            start = time.time()
            passes, by = run_tests(TESTS[mutant.file], tree, args.limit)
            if by.startswith("ended"):  # a busy machine can do that too: collectives of XLA abort if a device is late
                passes, by = run_tests(TESTS[mutant.file], tree, args.limit)
            (tree / mutant.file).write_text(source)
            outcome = {"noticed": not passes, "by": by, "seconds": round(time.time() - start, 1)}
            results.append(dataclasses.asdict(mutant) | outcome)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{i}/{len(drawn)} {'SURVIVED' if passes else 'noticed'} {mutant}  [{by}]", flush=True)
        check_noticing(results, tree, 10 * args.limit)
    survivors = sum(not e["noticed"] for e in results)
    print(f"{len(results)} faults, {len(results) - survivors} noticed, {survivors} survived")


if __name__ == "__main__":
    main()
