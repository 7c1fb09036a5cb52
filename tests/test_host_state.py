"""Hooks whose state cannot go through a loop or branch as values: called back from there, without `fullgraph=True`."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from test_host import agree, compiled
from test_state_random import COMPILED as JAX
from test_state_random import REFERENCE as PYTHON
from under import make_mesh

import jhop

X = jnp.array([0.5, -1.0, 2.0], jnp.float32)


class Box:
    total = 0.25  # of the class: the first hook that writes it makes an entry

    def __init__(self):
        self.n = 3
        self.seen = {}
        self.log = []

    def state(self):
        return {**vars(self), "log": len(self.log)}, [float(item) for item in self.log]


# Hooks: each a function that makes one for a box.


def new_key(box):
    def hook(ct):
        box.seen[f"call {len(box.seen)}"] = box.n
        box.n += 2
        return ct * (1.5 + len(box.seen))

    return hook


def new_attribute(box):
    def hook(ct):
        box.total += 0.5
        return ct * box.total

    return hook


def appends(box):
    def hook(ct):
        box.log.append(ct.sum())
        return ct * (1 + 0.25 * len(box.log))

    return hook


def steers(box):
    def hook(ct):
        box.n += 1
        return ct * 2 if box.n % 3 == 0 else ct + box.n

    return hook


def counts(box):
    def hook(ct):
        box.n += 1
        return ct * 0.5

    return hook


def counts_more(box):
    def hook(ct):
        box.n += 2
        return ct * 0.75

    return hook


# Programs: gradients of a function of flow, x, and two hooks.


def branches(flow, first, second):
    def of(x):
        return flow.cond(
            x.sum() > 1.0,
            lambda x: (jhop.hook(x, first) ** 2).sum(),
            lambda x: (jhop.hook(x * 1.5, second) ** 2).sum(),
            x,
        )

    return jax.grad(of)


def loop(flow, first, second):
    def run(x):
        def body(carry):
            i, x = carry
            return i + 1, x - 0.1 * jax.grad(lambda x: (jhop.hook(jhop.hook(x, first), second) ** 2).sum())(x)

        return flow.while_loop(lambda carry: carry[0] < 5, body, (0, x))[1]

    return run


def branches_in_a_loop(flow, first, second):
    def run(x):
        def body(carry):
            i, x = carry
            return i + 1, x - 0.1 * branches(flow, first, second)(x)

        return flow.while_loop(lambda carry: carry[0] < 5, body, (0, x))[1]

    return run


def long_scan(flow, first, second):
    def of(x):
        def body(c, _):
            return jnp.tanh(jhop.hook(jhop.hook(c * 1.1, first), second)) * 0.5, None

        return flow.scan(body, x, None, length=70)[0].sum()

    return jax.grad(of)


def checkpoint_in_a_branch(flow, first, second):
    of = flow.checkpoint(lambda x: (jhop.hook(jnp.sin(x), first) ** 2).sum())
    return jax.grad(lambda x: flow.cond(x[0] > 0.4, of, lambda x: (jhop.hook(x, second) * 2).sum(), x))


EVERYWHERE = [new_key, new_attribute, appends, steers]
CASES = [
    *((branches, make) for make in (new_key, new_attribute, appends)),
    *((loop, make) for make in EVERYWHERE),
    *((branches_in_a_loop, make) for make in (*EVERYWHERE, counts_more)),
    *((checkpoint_in_a_branch, make) for make in (new_key, new_attribute, appends)),
    *((long_scan, make) for make in (new_key, new_attribute, steers)),
]


def stepped(program, makes, flow, box):
    return program(flow, *(make(box) for make in makes))


@pytest.mark.filterwarnings("ignore:hook .* runs on the host at each run")
@pytest.mark.parametrize(("program", "make"), CASES, ids=lambda item: item.__name__)
def test_as_in_eager(program, make):
    boxes = Box(), Box()
    eager = stepped(program, (make, counts), PYTHON, boxes[0])
    step = jhop.jit(stepped(program, (make, counts), JAX, boxes[1]))
    for scale in (1.0, -0.5, 0.75):
        agree(step(X * scale), eager(X * scale))
        (got, log), (expected, sums) = (box.state() for box in boxes[::-1])
        assert got == expected
        assert log == pytest.approx(sums, rel=1e-4)
    assert step.versions() == 1


@pytest.mark.parametrize(("program", "make"), CASES, ids=lambda item: item.__name__)
def test_refused_as_one_graph(program, make):
    box = Box()
    before = str(box.state())
    with pytest.raises(jhop.Unsupported, match=r"inside (a )?`.*fullgraph=False"):
        jhop.jit(stepped(program, (make, counts), JAX, box), fullgraph=True)(X)
    assert str(box.state()) == before


def test_only_hooks_that_share_in_it_run_on_the_host():
    box, other = Box(), Box()

    def of(x, hook):
        x = lax.cond(x.sum() > 1.0, lambda x: jhop.hook(x, hook) * 2.0, lambda x: x, jhop.hook(x, counts(other)))
        return (jhop.hook(x * 1.5, lambda ct: ct * 3.0) ** 2).sum()

    run = compiled(of, new_key(box))
    for n in (1, 2, 3):
        agree(run(X), 27 * X * (1.5 + n))
        assert (len(box.seen), other.n) == (n, 3 + n)
    assert len(run.warnings) == 1
    assert "hook `hook` (test_host_state.py:" in run.warnings[0]
    assert "a hook inside `cond` writes Python state, and what it holds gets other entries" in run.warnings[0]


def test_error_in_the_middle_of_a_loop_leaves_all_as_it_was():
    box = Box()
    box.seen["kept"] = 1

    def hook(ct):
        box.seen[len(box.seen)] = box.n
        box.n += 1
        if box.n == 7:
            raise OverflowError("at seven")
        return ct

    run = jhop.jit(loop(JAX, hook, counts(box)))
    with (
        pytest.warns(UserWarning, match="runs on the host"),
        pytest.raises(OverflowError, match="at seven"),
    ):
        run(X)
    assert (box.seen, box.n) == ({"kept": 1}, 3)
    box.n = 6
    run(X)
    assert (len(box.seen), box.n) == (6, 16)


def test_refused_where_there_is_one_call_for_all_examples():
    box = Box()
    with pytest.raises(jhop.Unsupported, match=r"under jax.vmap it cannot run on the host"):
        jhop.jit(jax.vmap(loop(JAX, new_key(box), counts(box))))(jnp.stack([X, -X]))
    assert (box.seen, box.n) == ({}, 3)


def test_refused_inside_shard_map():
    box = Box()
    specs = {"mesh": make_mesh((2,), ("i",)), "in_specs": P("i"), "out_specs": P("i")}
    step = jax.shard_map(branches(JAX, new_key(box), counts(box)), **specs)
    with pytest.raises(jhop.Unsupported, match="shard_map"):
        jhop.jit(step)(jnp.arange(4.0))
    assert (box.seen, box.n) == ({}, 3)


def test_pure_function_of_its_state_has_no_host():
    box = Box()
    with pytest.raises(jhop.Unsupported, match="inside `cond` writes Python state"):
        pure, state = jhop.functionalize(branches(JAX, new_key(box), counts(box)))
        pure(state, X)
    assert (box.seen, box.n) == ({}, 3)
