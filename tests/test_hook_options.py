"""Options of `jhop.hook`: `zeros`, `stop`, `torch_complex`, alone and together, under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

RUNS = {"eager": lambda fn: fn, "jax.jit": jax.jit, "jhop.jit": lambda fn: jhop.jit(fn, fullgraph=True)}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


class Count:
    """A hook that counts its runs."""

    def __init__(self, fn=lambda ct: None):
        self.runs = 0
        self.fn = fn

    def __call__(self, ct):
        self.runs += 1
        return self.fn(ct)


# -- torch_complex -----------------------------------------------------------------------------------------------------


def turned(ct):
    """Tells the conventions apart: it shows the cotangent that it is given, times 1j."""
    return ct * 1j


@each_run
def test_torch_complex_gives_the_conjugate_and_conjugates_back(run):
    def loss(z, **options):
        return jnp.abs(jhop.hook(z, turned, **options) ** 2)

    z = jnp.complex64(1 + 2j)
    assert np.allclose(run(jax.grad(loss))(z), (2 - 4j) * 1j)  # JAX's convention
    found = run(jax.grad(lambda z: loss(z, torch_complex=True)))(z)
    assert np.allclose(found, np.conj((2 + 4j) * 1j))  # PyTorch's hook gets 2+4j


def test_torch_complex_in_a_pytree_with_other_leaves():
    def hook(cts):
        assert cts["n"].dtype == jax.dtypes.float0
        return {"z": cts["z"] * 1j, "x": cts["x"] * 7.0, "n": cts["n"]}

    def loss(z, x):
        tree = jhop.hook({"z": z, "x": x, "n": jnp.int32(3)}, hook, torch_complex=True)
        return jnp.abs(tree["z"] ** 2) * tree["n"].astype(float) + tree["x"] * 2.0

    z, x = jax.grad(loss, argnums=(0, 1))(jnp.complex64(1 + 2j), 5.0)
    assert np.allclose(z, 3 * np.conj((2 + 4j) * 1j))
    assert float(x) == 14.0


def test_torch_complex_keeps_the_contract_and_none():
    def gradient(fn):
        return jax.grad(lambda z: jnp.abs(jhop.hook(z, fn, torch_complex=True) ** 2))(jnp.complex64(1 + 2j))

    assert np.allclose(gradient(lambda ct: None), 2 - 4j)
    with pytest.raises(jhop.HookError, match=r"hook `<lambda>` \(.*\) must return .* complex64\[\].*float"):
        gradient(lambda ct: 3.0)
    with pytest.raises(jhop.HookError, match="but returned float32"):
        gradient(lambda ct: ct.real)


def test_torch_complex_under_vmap_scan_and_checkpoint():
    zs = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    expected = np.conj(2 * np.asarray(zs) * 1j)

    def loss(z):
        return jnp.abs(jhop.hook(z, turned, torch_complex=True) ** 2)

    def scanned(zs):
        return jax.lax.scan(lambda total, z: (total + loss(z), None), 0.0, zs)[0]

    assert np.allclose(jax.vmap(jax.grad(loss))(zs), expected)
    assert np.allclose(jhop.jit(jax.grad(scanned), fullgraph=True)(zs), expected)
    assert np.allclose(jax.vmap(jax.grad(jax.checkpoint(loss)))(zs), expected)


def test_torch_complex_with_python_state():
    count = Count(turned)
    step = jhop.jit(jax.grad(lambda z: jnp.abs(jhop.hook(z, count, torch_complex=True) ** 2)), fullgraph=True)
    for _ in range(3):
        assert np.allclose(step(jnp.complex64(1 + 2j)), np.conj((2 + 4j) * 1j))
    assert (count.runs, step.versions()) == (3, 1)


# -- stop --------------------------------------------------------------------------------------------------------------


def cube(fn, **options):
    return lambda x: jhop.hook(x, fn, **options) ** 3


@each_run
def test_stop_ends_the_history_at_the_hook(run):
    # The hooked gradient of x**3 is 2 * 3x**2.
    assert float(run(jax.grad(jax.grad(cube(lambda ct: ct * 2.0))))(3.0)) == 36.0
    assert float(run(jax.grad(cube(lambda ct: ct * 2.0, stop=True)))(3.0)) == 54.0
    assert float(run(jax.grad(jax.grad(cube(lambda ct: ct * 2.0, stop=True))))(3.0)) == 0.0


@each_run
def test_stop_in_forward_over_reverse(run):
    def both(x, **options):
        return jax.jvp(jax.grad(cube(lambda ct: ct * 2.0, **options)), (x,), (5.0,))

    assert [float(v) for v in run(both)(3.0)] == [54.0, 180.0]
    assert [float(v) for v in run(lambda x: both(x, stop=True))(3.0)] == [54.0, 0.0]


@each_run
@pytest.mark.parametrize("keep", [lambda ct: None, lambda ct: ct], ids=["None", "itself"])
def test_stop_leaves_the_history_of_what_is_kept(run, keep):
    assert float(run(jax.grad(jax.grad(cube(keep, stop=True))))(3.0)) == 18.0
    assert float(run(jax.grad(jax.grad(jax.grad(cube(keep, stop=True)))))(3.0)) == 6.0


@each_run
def test_stop_tells_leaves_apart(run):
    def loss(x, y):
        x, y = jhop.hook((x, y), lambda cts: (None, cts[1] * 2.0), stop=True)
        return x**3 * y**2

    def slopes(x, y):  # 3x**2 * y**2, with history, and 2 * x**3 * 2y, without
        return sum(jax.grad(loss, argnums=(0, 1))(x, y))

    x, y = 3.0, 5.0
    assert float(run(slopes)(x, y)) == 3 * x**2 * y**2 + 2 * x**3 * 2 * y
    assert [float(g) for g in run(jax.grad(slopes, argnums=(0, 1)))(x, y)] == [6 * x * y**2, 6 * x**2 * y]


def test_stop_counts_once():
    def second(count, **options):
        step = jhop.jit(jax.grad(jax.grad(cube(count, **options))), fullgraph=True)
        step(3.0)
        return count.runs

    def forward(count, **options):
        step = jhop.jit(lambda x: jax.jvp(jax.grad(cube(count, **options)), (x,), (5.0,)), fullgraph=True)
        step(3.0)
        return count.runs

    for ways in (second, forward):
        assert ways(Count(lambda ct: ct * 2.0)) == 2
        assert ways(Count(lambda ct: ct * 2.0), stop=True) == 1


def test_stop_under_vmap_scan_and_checkpoint():
    stopped = cube(lambda ct: ct * 2.0, stop=True)
    kept = cube(lambda ct: None, stop=True)
    xs = jnp.array([3.0, 5.0])

    def scanned(fn):
        return lambda xs: jax.lax.scan(lambda total, x: (total + fn(x), None), 0.0, xs)[0]

    def second(fn):
        return lambda x: jax.grad(lambda x: jax.grad(fn)(x).sum())(x)

    for wrap in (lambda fn: fn, jax.checkpoint):
        assert jax.vmap(jax.grad(wrap(stopped)))(xs).tolist() == [54.0, 150.0]
        assert jax.vmap(jax.grad(jax.grad(wrap(stopped))))(xs).tolist() == [0.0, 0.0]
        assert jax.vmap(jax.grad(jax.grad(wrap(kept))))(xs).tolist() == [18.0, 30.0]
        each = jax.vmap(jax.grad(wrap(kept)))
        assert jax.grad(lambda xs, each=each: each(xs).sum())(xs).tolist() == [18.0, 30.0]
        assert second(scanned(wrap(stopped)))(xs).tolist() == [0.0, 0.0]
        assert jhop.jit(second(scanned(wrap(kept))), fullgraph=True)(xs).tolist() == [18.0, 30.0]


def test_stop_on_a_hook_that_runs_on_the_host():
    seen = []

    def shown(ct):
        seen.append(float(ct))
        return ct * 2.0

    step = jhop.jit(jax.grad(lambda x: jax.grad(cube(shown, stop=True))(x) * x))
    with pytest.warns(UserWarning, match="runs on the host"):
        assert float(step(3.0)) == 54.0  # and not the derivative of 6x**3
    assert seen == [27.0]


def test_stop_with_values_that_the_hook_closes_over():
    def loss(x):
        return jhop.hook(x, lambda ct: ct * x, stop=True) ** 3

    assert float(jax.grad(loss)(3.0)) == 81.0
    assert float(jax.grad(jax.grad(loss))(3.0)) == 0.0
    assert float(jhop.jit(jax.grad(jax.grad(lambda x: loss(x) + x**2)))(3.0)) == 2.0


def test_a_captured_hook_with_stop_runs_and_prints():
    x = jnp.float32(3.0)
    gm = jhop.make_fx(jax.grad(cube(lambda ct: ct * 2.0, stop=True)))(x)
    assert float(gm(x)) == float(jhop.inline(gm)(x)) == 54.0
    assert "trace_wrapped" in gm.code
    assert "trace_wrapped" in gm.print_readable(print_output=False)
    assert "trace_wrapped" not in jhop.inline(gm).code


# -- zeros -------------------------------------------------------------------------------------------------------------


def shift(cts):
    """Shows which leaves it was given: adds their number, and 7 to each."""
    n = sum(ct is not None for ct in cts)
    return tuple(None if ct is None else ct + 7.0 * n for ct in cts)


def one_of(zeros, fn=shift):
    def loss(x, y):
        x, y = jhop.hook((x, y), fn, zeros=zeros)
        return x * 3.0

    return loss


@each_run
@pytest.mark.parametrize(
    ("zeros", "expected"), [("materialize", [17.0, 14.0]), ("none", [10.0, 0.0]), ("skip", [3.0, 0.0])]
)
def test_zeros_of_a_leaf_that_nothing_depends_on(run, zeros, expected):
    assert [float(g) for g in run(jax.grad(one_of(zeros), argnums=(0, 1)))(1.0, 2.0)] == expected


@each_run
@pytest.mark.parametrize(("zeros", "expected"), [("materialize", 17.0), ("none", 10.0), ("skip", 3.0)])
def test_zeros_of_a_leaf_by_which_nobody_differentiates(run, zeros, expected):
    def loss(x, y):
        x, y = jhop.hook((x, y), shift, zeros=zeros)
        return x * 3.0 + y * 5.0

    assert float(run(jax.grad(loss))(1.0, 2.0)) == expected
    both = [float(g) for g in run(jax.grad(loss, argnums=(0, 1)))(1.0, 2.0)]
    assert both == [17.0, 19.0]  # all are reached


@pytest.mark.parametrize("zeros", ["materialize", "none", "skip"])
def test_a_hook_with_no_leaf_reached_never_runs(zeros):
    def loss(x, y):
        jhop.hook((x, y), lambda cts: pytest.fail("nothing depends on it"), zeros=zeros)
        return x * 3.0

    assert float(jax.grad(loss)(1.0, 2.0)) == 3.0


@pytest.mark.parametrize("zeros", ["materialize", "none"])
def test_none_keeps(zeros):
    assert [float(g) for g in jax.grad(one_of(zeros, lambda cts: None), argnums=(0, 1))(1.0, 2.0)] == [3.0, 0.0]
    found = jax.grad(one_of(zeros, lambda cts: (cts[0] * 5.0, None)), argnums=(0, 1))(1.0, 2.0)
    assert [float(g) for g in found] == [15.0, 0.0]


def test_a_gradient_where_none_was_given_is_an_error():
    with pytest.raises(jhop.HookError, match=r"hook `<lambda>` \(.*\) returned a float32\[\] where it was given None"):
        jax.grad(one_of("none", lambda cts: (cts[0], cts[0])))(1.0, 2.0)


def test_none_stands_in_the_structure_of_the_value():
    def hook(cts):
        assert cts == {"w": cts["w"], "b": None, "none": None, "n": cts["n"]}
        assert cts["n"].dtype == jax.dtypes.float0
        return {**cts, "w": cts["w"] * 5.0}

    def loss(tree):
        tree = jhop.hook({**tree, "none": None, "n": jnp.int32(2)}, hook, zeros="none")
        return (tree["w"] * tree["n"].astype(float)).sum()

    found = jax.grad(loss)({"w": jnp.ones(2), "b": jnp.ones(3)})
    assert {key: value.tolist() for key, value in found.items()} == {"w": [10.0, 10.0], "b": [0.0, 0.0, 0.0]}


def test_zeros_under_vmap():
    for zeros, x, y in (("materialize", 17.0, 14.0), ("none", 10.0, 0.0), ("skip", 3.0, 0.0)):
        grads = jax.vmap(jax.grad(one_of(zeros), argnums=(0, 1)))(jnp.ones(2), jnp.ones(2))
        assert [g.tolist() for g in grads] == [[x, x], [y, y]]
        # Mapped inside of the derivative, and in part.
        mapped = lambda xs, y: jax.vmap(one_of(zeros), in_axes=(0, None))(xs, y).sum()  # noqa: E731, B023
        assert [g.tolist() for g in jax.grad(mapped, argnums=(0, 1))(jnp.ones(2), 1.0)] == [[x, x], 2 * y]
        named = lambda xs: jax.vmap(lambda x: one_of(zeros)(x, 2.0), axis_name="i")(xs).sum()  # noqa: E731, B023
        assert jax.grad(named)(jnp.ones(2)).tolist() == [x, x]


def test_zeros_in_scan_and_checkpoint():
    def scanned(zeros):
        def body(total, x):
            x, _ = jhop.hook((x, x * 2.0), shift, zeros=zeros)
            return total + x * 3.0, None

        return lambda xs: jax.lax.scan(body, 0.0, xs)[0]

    for zeros, expected in (("materialize", 17.0 + 2 * 14.0), ("none", 10.0), ("skip", 3.0)):
        for wrap in (lambda fn: fn, jax.checkpoint):
            gradient = jhop.jit(jax.grad(wrap(scanned(zeros))), fullgraph=True)
            assert gradient(jnp.ones(2)).tolist() == [expected, expected]
        once = jax.checkpoint(one_of(zeros))
        assert float(jax.grad(lambda x, fn=once: fn(x, x * 2.0))(1.0)) == expected


def test_zeros_with_python_state():
    given = []

    def hook(cts):
        given.append(jnp.stack([ct for ct in cts if ct is not None]).sum())

    step = jhop.jit(jax.grad(one_of("none", hook), argnums=(0, 1)), fullgraph=True)
    for _ in range(2):
        step(1.0, 2.0)
    assert [float(total) for total in given] == [3.0, 3.0]


def test_zeros_with_values_that_the_hook_closes_over():
    def loss(x, y):
        scale = x * 5.0
        x, y = jhop.hook((x, y), lambda cts: tuple(None if ct is None else ct * scale for ct in cts), zeros="none")
        return x * 3.0

    for run in RUNS.values():
        assert [float(g) for g in run(jax.grad(loss, argnums=(0, 1)))(2.0, 2.0)] == [30.0, 0.0]
    assert float(jax.grad(jax.grad(loss))(2.0, 2.0)) == 15.0


def test_forward_mode_passes_through():
    for zeros in ("materialize", "none", "skip"):
        loss = one_of(zeros)
        assert [float(v) for v in jax.jvp(lambda x, loss=loss: loss(x, 2.0), (1.0,), (5.0,))] == [3.0, 15.0]
        assert float(jax.jacfwd(loss)(1.0, 2.0)) == 3.0
        assert float(jax.linearize(loss, 1.0, 2.0)[1](5.0, 1.0)) == 15.0


# -- together ----------------------------------------------------------------------------------------------------------


@each_run
def test_all_of_them_together(run):
    def hook(cts):
        assert cts[1] is None
        return cts[0] * 1j, None

    def loss(z, w):
        z, _ = jhop.hook((z, w), hook, zeros="none", stop=True, torch_complex=True, name="turn")
        return jnp.abs(z**2)

    def size(z):
        return jnp.abs(jax.grad(loss)(z, z)) ** 2

    z = jnp.complex64(1 + 2j)
    assert np.allclose(run(jax.grad(loss, argnums=(0, 1)))(z, z), [np.conj((2 + 4j) * 1j), 0])
    assert np.allclose(run(size)(z), 20.0)
    assert np.allclose(run(jax.grad(size))(z), 0.0)


@pytest.mark.parametrize("x", [3.0, jnp.ones(2)], ids=["number", "array"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"zeros": "nothing"}, "zeros to be one of 'materialize', 'none', 'skip', got 'nothing'"),
        ({"zeros": None}, "zeros to be one of 'materialize', 'none', 'skip', got None"),
        ({"zeros": ["none"]}, r"zeros to be one of .*, got \['none'\]"),
        ({"stop": "yes"}, "stop to be True or False, got 'yes'"),
        ({"torch_complex": 1}, "torch_complex to be True or False, got 1"),
    ],
)
def test_other_values_are_errors_at_the_call(x, options, told):
    with pytest.raises(jhop.HookError, match=f"^jhop.hook: expected {told}"):
        jhop.hook(x, lambda ct: ct, **options)


def test_defaults_are_one_hook_with_no_options():
    fn = Count()
    closed = jax.make_jaxpr(jax.grad(lambda x: jhop.hook(jhop.hook(x, fn), fn, stop=False, zeros="materialize") ** 2))
    first, second = [eqn.params["fn"] for eqn in closed(1.0).jaxpr.eqns if eqn.primitive.name == "trace_wrapped"]
    assert first == second
    other = jax.make_jaxpr(jax.grad(lambda x: jhop.hook(x, fn, stop=True) ** 2))(1.0)
    assert first not in [eqn.params["fn"] for eqn in other.jaxpr.eqns if eqn.primitive.name == "trace_wrapped"]
