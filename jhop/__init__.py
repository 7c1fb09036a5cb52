"""Backward hooks for JAX that are traced.

`jhop.hook(x, fn)` puts a hook on a value inside any JAX function; `jhop.tensor` and `Tensor.register_hook` do it in the
manner of PyTorch. See README.md.
"""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from jhop import _anomaly as _anomaly
from jhop import _indexing as _indexing
from jhop import _record as _record
from jhop import _text as _text
from jhop import autograd as autograd
from jhop import backends as backends
from jhop import compiled_autograd as compiled_autograd
from jhop import numpy as numpy
from jhop import testing as testing
from jhop._backward_graph import backward_graph as backward_graph
from jhop._capture import make_fx as make_fx
from jhop._check import check as check
from jhop._edges import edge as edge
from jhop._errors import CheckError as CheckError
from jhop._errors import HookError as HookError
from jhop._errors import JhopError as JhopError
from jhop._errors import NanError as NanError
from jhop._errors import Unsupported as Unsupported
from jhop._explain import explain as explain
from jhop._forward import compile as compile
from jhop._functionalize import functionalize as functionalize
from jhop._graph import GraphModule as GraphModule
from jhop._hook import RemovableHandle as RemovableHandle
from jhop._hook_fn import hook_fn as hook_fn
from jhop._inline import inline as inline
from jhop._jit import jit as jit
from jhop._lift import lift as lift
from jhop._nan_guard import nan_guard as nan_guard
from jhop._point import hook as hook
from jhop._reset import reset as reset
from jhop._strict import strict as strict
from jhop._tensor import Tensor as Tensor
from jhop._tensor import tensor as tensor
from jhop._trace_wrapped import trace_wrapped as trace_wrapped

try:
    __version__ = _version("jhop")
except _NotInstalled:  # a checkout that was never installed
    __version__ = "0+unknown"
