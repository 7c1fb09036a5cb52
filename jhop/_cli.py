"""`python -m jhop graph`: the graph of a function that is named on the command line.

Every fault of the command line is a `JhopError` of one line that names the word at fault.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jhop
from jhop import _source
from jhop._contract import is_inexact

_TYPE_FORM = "a dtype and sizes, such as f32[4,8], i32[3] or f32"
_KINDS = {"f": "float", "bf": "bfloat", "i": "int", "u": "uint", "c": "complex"}
_DTYPES = "bool i8 i16 i32 i64 u8 u16 u32 u64 f16 bf16 f32 f64 c64 c128".split()


def graph_text(
    function: str, types: Sequence[str], *, forward: bool = False, inlined: bool = False, dialect: str = "jax"
) -> str:
    """The text of the graph of a user's function.

    Args:
        function: MODULE:FUNCTION. MODULE is importable, from the current folder too, or is the path of a file.
        types: one per positional argument, such as "f32[4,8]".
        forward: whether the graph is of the function itself, not of its backward pass.
        inlined: whether hooks are inlined and their state is lifted.
        dialect: as for `GraphModule.print_readable`.

    Raises:
        JhopError: there is no such function, a type is none, or the function does not take these types.
    """
    args = [_example(text) for text in types]
    where, colon, name = function.rpartition(":")
    if not (colon and where and name):
        raise jhop.JhopError(f"`{function}`: expected MODULE:FUNCTION, such as net:loss or examples/net.py:loss.")
    path = where if where.endswith(".py") or os.path.basename(where) != where else None
    with _importing_from(os.path.dirname(os.path.abspath(path)) if path else os.getcwd()):
        fn = _find(_load_file(path) if path else _load_module(where), where, name)
        _check_call(fn, function, args, types, forward)
        try:
            gm = jhop.make_fx(fn)(*args) if forward else jhop.backward_graph(fn)(*args)
        except jhop.JhopError:
            raise
        except Exception as error:  # such as a loop that JAX cannot differentiate
            raise jhop.JhopError(f"`{function}`: while its graph was captured, JAX raised {_brief(error)}") from error
        if inlined:
            gm = jhop.inline(gm)
        text = gm.print_readable(False, dialect=dialect).rstrip()
        return "\n".join([text, *state_lines(gm)]) if dialect == "torch" else text  # the other names state itself


def state_lines(gm: jhop.GraphModule) -> list[str]:
    """Comment lines that name the lifted state of an inlined graph by path: what it reads, then what it writes."""
    if gm.lifted is None:
        return []
    written = [write.container.path_of(write.key) for write in gm.lifted.writes]
    return [
        *(f"# state in:  {given.source}" for given in gm.inputs if given.role == "state"),
        *(f"# state out: {path}" for path in written),
    ]


# -- the function ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Lets modules in a folder be imported, as Python does for the folder of a script."""
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # a module that it imports
            raise _import_failed(name, error) from error
        raise jhop.JhopError(
            f"module `{name}`: not found ({error}), neither installed nor in the current folder. "
            "A file is named by its path: folder/net.py:loss."
        ) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, error) from error


def _load_file(path: str) -> ModuleType:
    if not path.endswith(".py") and os.path.isfile(f"{path}.py"):
        path = f"{path}.py"
    if not os.path.isfile(path):
        raise jhop.JhopError(f"module `{path}`: there is no such file.")
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:  # such as a file called `random.py`
        name = f"_jhop_graph_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise jhop.JhopError(f"module `{path}`: expected a Python file, whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(path, error) from error
    return module


def _import_failed(name: str, error: BaseException) -> jhop.JhopError:
    return jhop.JhopError(f"module `{name}`: importing it raised {_brief(error)}")


def _find(module: ModuleType, where: str, name: str) -> Callable[..., Any]:
    """The function of a module; a dotted name is looked up step by step."""
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            names = [known for known in dir(found) if callable(getattr(found, known, None)) and known[:2] != "__"]
            close = difflib.get_close_matches(part, names, n=3)
            hint = f" Did you mean {' or '.join(f'`{known}`' for known in close)}?" if close else ""
            raise jhop.JhopError(f"function `{name}`: module `{where}` has none of this name.{hint}") from error
    if not callable(found):
        raise jhop.JhopError(f"function `{name}`: in module `{where}` this is of type {type(found).__name__}.")
    return found


def _check_call(fn: Callable[..., Any], function: str, args: list[Any], types: Sequence[str], forward: bool) -> None:
    """Refuses what has no graph. The function is traced once for it; no hook runs."""
    given = " ".join(types) or "no types"
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none
        pass
    else:
        try:
            signature.bind(*args)
        except TypeError as error:
            raise jhop.JhopError(f"`{function}`: its arguments are {signature}, but got {given}: {error}.") from error
    try:
        outs = jax.tree.leaves(jax.eval_shape(fn, *args))
    except jhop.JhopError:
        raise
    except Exception as error:
        raise jhop.JhopError(f"`{function}`: for {given} it raised {_brief(error)}") from error
    if forward:
        return
    if not any(is_inexact(out.dtype) for out in outs):
        found = ", ".join(f"{out.dtype}{list(out.shape)}" for out in outs) or "nothing"
        raise jhop.JhopError(
            f"`{function}`: it returns {found}, and only floating and complex results have a backward pass. "
            "Return a floating value, or print the function itself with --forward."
        )
    if not any(is_inexact(arg.dtype) for arg in args):
        raise jhop.JhopError(f"`{function}`: only floating and complex arguments have gradients, got {given}.")


def _brief(error: BaseException) -> str:
    """An exception in one line: its type, the first line of its message, and where in the user's code it came from."""
    lines = str(error).strip().splitlines()
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if _source.is_user_file(frame.filename):
            place = f" ({os.path.basename(frame.filename)}:{frame.lineno})"
    if isinstance(error, SyntaxError):
        place = f" ({os.path.basename(error.filename or '?')}:{error.lineno})"
        lines = [error.msg]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}{place}"


# -- types -------------------------------------------------------------------------------------------------------------


def _example(text: str) -> Any:
    """An array of the type that a word names; it takes no memory, whatever its size."""
    match = re.fullmatch(r"(\w+)(?:\[(|\d+(?:,\d+)*,?)\])?", re.sub(r"\s", "", text), re.ASCII)
    if match is None:
        raise jhop.JhopError(f"type `{text}`: expected {_TYPE_FORM}.")
    dtype = _dtype(match[1], text)
    sizes = [int(size) for size in (match[2] or "").split(",") if size]
    try:
        return np.broadcast_to(np.zeros((), dtype), sizes)
    except ValueError as error:
        raise jhop.JhopError(f"type `{text}`: the sizes are too large ({error}).") from error


def _dtype(name: str, text: str) -> Any:
    short = re.fullmatch(r"(bf|[fiuc])(\d\w*)", name)
    full = _KINDS[short[1]] + short[2] if short else name
    if not re.fullmatch(r"bool|(bfloat|float|u?int|complex)\d\w*", full) or not hasattr(jnp, full):
        close = difflib.get_close_matches(name, _DTYPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise jhop.JhopError(
            f"type `{text}`: `{name}` is no dtype; expected {_TYPE_FORM}, with one of {' '.join(_DTYPES)}.{hint}"
        )
    dtype = jnp.dtype(full)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise jhop.JhopError(f"type `{text}`: JAX has 64-bit types only with JAX_ENABLE_X64=1 in the environment.")
    return dtype
