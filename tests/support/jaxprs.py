"""What a traced program does, equation by equation."""

from pathlib import Path

import jax
from jax.extend.core import Literal, jaxprs_in_params

from pgpsam_jax.models.parameters import flat_paths


def equations(jaxpr):
    """The equations of a jaxpr and of all that is nested in it."""
    for equation in jaxpr.eqns:
        yield equation
        for nested in jaxprs_in_params(equation.params):
            yield from equations(nested)


def own_gradients(jaxpr) -> set[tuple[str, str, str]]:
    """(primitive, file, function) of ours where gradients are stopped or made by hand."""
    found = set()
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if name == "stop_gradient" or name.startswith("custom_vjp"):
            frames = equation.source_info.traceback.frames
            place = next(n for n, f in enumerate(frames) if "site-packages" not in f.file_name)
            ours, theirs = frames[place], {f.function_name for f in frames[:place]}
            if not theirs & {"softmax", "_softmax", "logsumexp"}:  # of the largest score
                found.add((name, Path(ours.file_name).name, ours.function_name))
    return found


def constants(function, *arguments) -> set[str]:
    """Paths of the outputs that depend on no argument, as what stops a gradient leaves zeros."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    known = set(traced.jaxpr.invars)
    for equation in traced.jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in known for x in equation.invars):
            known.update(equation.outvars)
    outputs = zip(flat_paths(shapes), traced.jaxpr.outvars, strict=True)
    return {name for name, value in outputs if isinstance(value, Literal) or value not in known}
