"""What errors advise fits the function that was called, and a hook that runs on the host is told of once."""

import io
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

import jhop

X = jnp.array([1.0, 2.0, 3.0])
FULLGRAPH = "pass `fullgraph=False`, which runs this hook on the host each time"
TO_JIT = "compile with `jhop.jit`, which runs this hook on the host each time"
AHEAD = "call the function, not ahead of time, with `fullgraph=False`"
kept = types.SimpleNamespace(file=io.StringIO(), lock=threading.Lock(), nodes=iter("abc"), code=None)
places = {}


def prints(ct):
    print(ct)


def prints_at_heart(ct):
    try:
        print(ct)
    except Exception:
        return ct


def branches(ct):
    return ct if ct.sum() > 0 else -ct


def reads(ct):
    return ct * float(ct[0])


def reads_and_catches(ct):
    try:
        return ct * float(ct[0])
    except jax.errors.ConcretizationTypeError:
        return ct


def makes_text(ct):
    return ct * len(str(ct))


def has_a_file(ct):
    kept.file.write("x")


def has_an_iterator(ct):
    return ct * len(next(kept.nodes))


class Hook:
    def __call__(self, ct):
        self.__class__ = Other


class Other(Hook):
    pass


HOOKS = [prints, prints_at_heart, branches, reads, reads_and_catches, makes_text, has_a_file, has_an_iterator, Hook()]


def gradient(hook):
    return jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum())


def by_inline(hook):
    jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook))(X))


def by_functionalize(hook):
    pure, state = jhop.functionalize(gradient(hook))
    pure(state, X)


def by_compiled_autograd(hook):
    x = jhop.tensor([1.0, 2.0], requires_grad=True)
    x.register_hook(hook)
    with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, fullgraph=True)):
        (x * 3.0).sum().backward()


ENTRIES = {
    "jhop.jit": (lambda hook: jhop.jit(gradient(hook), fullgraph=True)(X), FULLGRAPH),
    "compiled autograd": (by_compiled_autograd, FULLGRAPH),
    "ahead of time": (lambda hook: jhop.jit(gradient(hook)).lower(X), AHEAD),
    "jax.jit": (lambda hook: jax.jit(gradient(hook))(X), TO_JIT),
    "jhop.inline": (by_inline, TO_JIT),
    "jhop.functionalize": (by_functionalize, TO_JIT),
}


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: getattr(hook, "__name__", "class"))
@pytest.mark.parametrize(("call", "advice"), ENTRIES.values(), ids=ENTRIES)
def test_advice_fits_what_was_called(call, advice, hook):
    if hook is HOOKS[-1] and call is ENTRIES["jax.jit"][0]:
        pytest.skip("jax.jit says of a hook that writes that it takes jhop.jit")
    with pytest.raises(jhop.Unsupported) as caught:
        call(hook)
    assert f"or {advice}" in str(caught.value)
    assert ("fullgraph" in str(caught.value)) == (advice is not TO_JIT)


def test_advice_does_not_outlast_a_call():
    for name in ["jhop.inline", "jhop.jit", "jhop.functionalize", "jhop.jit"]:
        call, advice = ENTRIES[name]
        with pytest.raises(jhop.Unsupported, match=advice):
            call(prints)


def passes(compiler_fn, hooks, sizes):
    """How many warnings each of several backward passes gives."""
    counts = []
    for size, hook in zip(sizes, hooks, strict=True):
        x = jhop.tensor([1.0] * size, requires_grad=True)
        x.register_hook(hook)
        with warnings.catch_warnings(record=True) as caught, jhop.compiled_autograd.enable(compiler_fn()):
            warnings.simplefilter("always")
            (x * 3.0).sum().backward()
        assert x.grad.tolist() == [3.0] * size
        counts.append(len(caught))
    return counts


def new_compiler():
    return lambda gm: jhop.compile(gm)


def also_prints(ct):
    print("also", ct)


def test_hook_on_the_host_is_told_of_once(capsys):
    assert passes(new_compiler, [prints] * 3, [2, 2, 2]) == [1, 0, 0]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_hook_on_the_host_is_told_of_once_for_all_shapes():
    compiler_fn = new_compiler()
    assert passes(lambda: compiler_fn, [prints] * 3, [2, 3, 4]) == [1, 0, 0]


def test_each_hook_on_the_host_is_told_of():
    assert passes(new_compiler, [prints, also_prints, prints, also_prints], [2] * 4) == [1, 1, 0, 0]


def test_hook_on_the_host_is_told_of_again_after_a_reset():
    assert passes(new_compiler, [prints], [2]) == [1]
    jhop.reset()
    assert passes(new_compiler, [prints], [2]) == [1]
