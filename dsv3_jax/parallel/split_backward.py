"""A backward pass in two halves: first the gradients that others wait for, those of the weights when there is time.

`jax.vjp` computes what it keeps once, and both halves take it from there: neither runs the forward pass again. The
second takes from the first what that has made already, such as the gradients of activations, and computes the rest: the
products of these with the activations. What depends on the parameters alone (rounded or transposed weights) is computed
where it is used and never kept.

The halves are cut from the traced program, operation by operation. A loop, a branch or a `shard_map` is one operation:
of one that makes gradients of both kinds each half computes its own, with what leads to them. Calls are looked into, so
that `jax.checkpoint` recomputes what its policy says once, in the first half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal
from jax.interpreters import partial_eval

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}
"""Primitives that only name what they compute, and the parameter that has it."""


class SplitBackward:
    """The passes of `function(late, early, x, rest) -> (outputs, aux)` at the given (abstract) arguments.

    `outputs` are differentiated by `late`, whose gradient may wait, `early` and `x`; `aux` isn't, nor by `rest`.
    """

    def __init__(self, function: Callable[..., Any], late: Any, early: Any, x: Any, rest: Any) -> None:
        tree: Any = None

        def forward(late: Any, early: Any, x: Any, rest: Any) -> Any:
            nonlocal tree
            of = lambda late, early, x: function(late, early, x, rest)
            outputs, pull, aux = jax.vjp(of, late, early, x, has_aux=True)
            residuals, tree = jax.tree.flatten(pull)
            return (outputs, aux), residuals

        def backward(residuals: Any, g: Any) -> Any:
            return jax.tree.leaves(jax.tree.unflatten(tree, residuals)(g))

        (made, residuals), self._forward = _traced(forward, late, early, x, rest)
        _, self._backward = _traced(backward, residuals, made[0])
        self._made, self._forms = _structure(made), (_structure(late), _structure((early, x)))

        parameters = len(jax.tree.leaves((late, early)))
        self._parameters = self._forward.invars[:parameters]
        # A residual is a value of the forward pass, and an argument of the backward pass.
        taken = self._forward.outvars[self._made.num_leaves :]
        arguments = self._backward.invars
        self._residuals = list(zip(arguments, taken, strict=False))
        self._cotangents = arguments[len(taken) :]
        moving = _depending(self._forward.eqns, self._forward.invars[parameters:])
        named = list(dict.fromkeys(v for v in taken if not isinstance(v, Literal)))
        self._kept = [v for v in named if v in moving]
        self._fixed = _needed(self._forward.eqns, [v for v in named if v not in moving])
        self._pass = _needed(self._forward.eqns, [*self._forward.outvars[: self._made.num_leaves], *self._kept])

        count = self._forms[0].num_leaves
        self._late, self._early = self._backward.outvars[:count], self._backward.outvars[count:]
        self._first = _needed(self._backward.eqns, self._early)
        of_tokens = {a for a, v in self._residuals if not isinstance(v, Literal) and v in moving}
        depends = _depending(self._backward.eqns, of_tokens | {*self._cotangents})
        there = {v for eqn in self._first for v in eqn.outvars if v in depends}
        self._second = _needed(self._backward.eqns, self._late, there)
        used = [v for eqn in self._second for v in eqn.invars] + self._late
        self._handed_on = list(dict.fromkeys(v for v in used if not isinstance(v, Literal) and v in there))

    def forward(self, late: Any, early: Any, x: Any, rest: Any) -> tuple[Any, list[jax.Array]]:
        """Returns (outputs, aux), and what the other passes take of it."""
        values = _constants(self._forward)
        values |= zip(self._forward.invars, jax.tree.leaves((late, early, x, rest)), strict=True)
        _run(self._pass, values)
        made = [_read(values, v) for v in self._forward.outvars[: self._made.num_leaves]]
        return jax.tree.unflatten(self._made, made), [values[v] for v in self._kept]

    def first(self, late: Any, early: Any, kept: Sequence[jax.Array], g: Any) -> tuple[Any, list[jax.Array]]:
        """The gradients of `early` and `x` that follow from that of the outputs, and what `second` takes of them."""
        values = self._start(late, early, kept)
        values |= zip(self._cotangents, jax.tree.leaves(g), strict=True)
        _run(self._first, values)
        early_and_x = jax.tree.unflatten(self._forms[1], [_read(values, v) for v in self._early])
        return early_and_x, [values[v] for v in self._handed_on]

    def second(self, late: Any, early: Any, kept: Sequence[jax.Array], handed_on: Sequence[jax.Array]) -> Any:
        """The gradient of `late`."""
        values = self._start(late, early, kept)
        values |= zip(self._handed_on, handed_on, strict=True)
        _run(self._second, values)
        return jax.tree.unflatten(self._forms[0], [_read(values, v) for v in self._late])

    def _start(self, late: Any, early: Any, kept: Sequence[jax.Array]) -> dict[Any, Any]:
        """The residuals, as the backward pass names them."""
        known = _constants(self._forward)
        known |= zip(self._parameters, jax.tree.leaves((late, early)), strict=True)
        _run(self._fixed, known)
        known |= zip(self._kept, kept, strict=True)
        return _constants(self._backward) | {place: _read(known, v) for place, v in self._residuals}


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _constants(program: Any) -> dict[Any, Any]:
    """Values that a program has from elsewhere."""
    return dict(zip(program.jaxpr.constvars, program.consts, strict=True))


def _traced(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The shapes that a function returns, and its program without calls."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    flat = jax.make_jaxpr(lambda *values: _looked_into(program, values))(*jax.tree.leaves(arguments))
    return shapes, flat


def _looked_into(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a program, and calls as if their operations stood in their place."""
    values: dict[Any, Any] = dict(zip(program.jaxpr.all_invars, [*program.consts, *arguments], strict=True))
    for eqn in program.jaxpr.eqns:
        if name := _CALLS.get(eqn.primitive.name):
            inner: Any = eqn.params[name]
            made = _looked_into(inner, [_read(values, v) for v in eqn.invars])
            values |= dict(zip(eqn.outvars, made, strict=True))
        else:
            _run([eqn], values)
    return [_read(values, v) for v in program.jaxpr.outvars]


def _read(values: dict[Any, Any], v: Any) -> Any:
    return v.val if isinstance(v, Literal) else values[v]


def _run(eqns: Iterable[JaxprEqn], values: dict[Any, Any]) -> None:
    """Evaluates operations in their order, from `values` into `values`."""
    for eqn in eqns:
        how = eqn.primitive.get_bind_params(eqn.params)
        with eqn.ctx.manager, jax.named_scope(str(eqn.source_info.name_stack) or "_"):
            made = eqn.primitive.bind(*(_read(values, v) for v in eqn.invars), **how)
        values |= zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True)


def _depending(eqns: Iterable[JaxprEqn], on: Iterable[Any]) -> set[Any]:
    """All that depends on these variables, and they."""
    depends = set(on)
    for eqn in eqns:
        if any(not isinstance(v, Literal) and v in depends for v in eqn.invars):
            depends.update(eqn.outvars)
    return depends


def _needed(eqns: Sequence[JaxprEqn], wanted: Iterable[Any], there: Iterable[Any] = ()) -> list[JaxprEqn]:
    """The operations, or parts of them, that `wanted` takes, where `there` are values already."""
    there = set(there)
    needed = {v for v in wanted if not isinstance(v, Literal) and v not in there}
    found = []
    for eqn in reversed(eqns):
        used = [v in needed for v in eqn.outvars]
        if not any(used):
            continue
        rule = partial_eval.dce_rules.get(eqn.primitive)
        part = eqn if rule is None else rule(used, eqn)[1]
        assert part is not None
        found.append(part)
        needed.update(v for v in part.invars if not isinstance(v, Literal) and v not in there)
    return found[::-1]
