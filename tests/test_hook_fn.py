"""`jhop.hook_fn`: hooks before and after the backward of a function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from under import agree, make_mesh

import jhop

RUNS = {"eager": lambda fn: fn, "jax.jit": jax.jit, "jhop.jit": lambda fn: jhop.jit(fn, fullgraph=True)}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def mul(x, w):
    return x * w


def tens(cts):
    return jax.tree.map(lambda ct: ct * 10.0, cts)


def sevens(grads):
    return jax.tree.map(lambda grad: grad * 7.0, grads)


def with_outs(grads, cts):
    """Adds up all that it is given, and 100 per gradient that is there."""
    total = sum(leaf.sum() for leaf in jax.tree.leaves((grads, cts)))
    return jax.tree.map(lambda grad: grad + 100.0 * len(jax.tree.leaves(grads)) + total, grads)


def numbers(tree):
    return jax.tree.map(lambda leaf: leaf.tolist(), tree)


@each_run
def test_pre_is_on_the_result_and_post_on_the_arguments(run):
    def gradients(**hooks):
        return numbers(run(jax.grad(jhop.hook_fn(mul, **hooks), argnums=(0, 1)))(3.0, 5.0))

    assert gradients() == (5.0, 3.0)
    assert gradients(pre=tens) == (50.0, 30.0)
    assert gradients(post=sevens) == (35.0, 21.0)
    assert gradients(pre=tens, post=sevens) == (350.0, 210.0)
    assert gradients(pre=lambda ct: None, post=lambda grads: None) == (5.0, 3.0)
    assert gradients(post=lambda grads: (None, grads[0])) == (5.0, 5.0)


@each_run
def test_post_may_take_the_cotangents_of_the_result_as_pre_left_them(run):
    def gradients(**hooks):
        return numbers(run(jax.grad(jhop.hook_fn(mul, **hooks), argnums=(0, 1)))(3.0, 5.0))

    assert gradients(post=with_outs) == (5.0 + 200.0 + 9.0, 3.0 + 200.0 + 9.0)
    assert gradients(pre=tens, post=with_outs) == (50.0 + 200.0 + 90.0, 30.0 + 200.0 + 90.0)
    assert gradients(post=lambda grads, cts: None) == (5.0, 3.0)
    assert gradients(post=lambda grads, cts: (None, cts)) == (5.0, 1.0)


@pytest.mark.parametrize("post", [lambda grads: with_outs(grads, ()), with_outs], ids=["one", "two"])
def test_none_for_arguments_by_which_nobody_differentiates(post):
    extra = 1.0 if post is with_outs else 0.0
    layer = jhop.hook_fn(lambda x, n, flag, w: x * w * n if flag else x, post=post)
    found = jax.grad(layer, argnums=(0, 3))(3.0, 2, True, 5.0)
    assert numbers(found) == (10.0 + 200.0 + 16.0 + extra, 6.0 + 200.0 + 16.0 + extra)
    assert float(jax.grad(layer)(3.0, 2, True, 5.0)) == 10.0 + 100.0 + 10.0 + extra
    # In `jax.jit` all arrays are tracers, and all the same only one of them is differentiated.
    jitted = jax.jit(jax.grad(layer), static_argnums=2)
    assert float(jitted(3.0, 2, True, 5.0)) == 10.0 + 100.0 + 10.0 + extra


@each_run
@pytest.mark.parametrize("post", [sevens, lambda grads, cts: sevens(grads)], ids=["one", "two"])
def test_structures_are_those_of_arguments_and_result(run, post):
    def hook(cts):
        assert cts == {"y": cts["y"], "unused": None, "n": None, "nothing": None, "word": None}
        return {**cts, "y": cts["y"] * 10.0}

    def layer(params, x, *, scale):
        y = params["w"] @ x * scale + params["b"]
        return {"y": y, "unused": y * 2.0, "n": jnp.int32(2), "nothing": None, "word": "y"}

    def loss(params, x):
        hooked = jhop.hook_fn(layer, pre=hook, post=post)
        return hooked(params, x, scale=params["scale"])["y"].sum()

    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2), "scale": jnp.float32(3.0)}
    x = jnp.array([1.0, 2.0, 5.0])
    found, by_x = run(jax.grad(loss, argnums=(0, 1)))(params, x)
    plain, plain_x = jax.grad(lambda p, x: layer(p, x, scale=p["scale"])["y"].sum(), argnums=(0, 1))(params, x)
    # A keyword has no hook of its own, but two ways lead to it: as a keyword (times 10), and in `params` (times 0).
    agree(found, {"w": plain["w"] * 70.0, "b": plain["b"] * 70.0, "scale": plain["scale"] * 10.0})
    agree(by_x, plain_x * 70.0)


@pytest.mark.parametrize("post", [sevens, lambda grads, cts: sevens(grads)], ids=["one", "two"])
def test_what_the_function_closes_over_has_no_hook(post):
    def loss(x, w):
        return jhop.hook_fn(lambda x: x * w, pre=tens, post=post)(x)

    assert numbers(jax.grad(loss, argnums=(0, 1))(3.0, 5.0)) == (350.0, 30.0)


@pytest.mark.parametrize("post", [sevens, lambda grads, cts: sevens(grads)], ids=["one", "two"])
def test_no_gradient_no_run(post):
    def never(*cts):
        pytest.fail("nothing reaches it")

    two = (lambda grads, cts: never()) if post is not sevens else never
    silent = jhop.hook_fn(mul, pre=never, post=two)
    assert float(jax.grad(lambda x: x * 2.0 + jax.lax.stop_gradient(silent(x, x)))(3.0)) == 2.0
    assert float(silent(3.0, 5.0)) == 15.0
    assert numbers(jax.jvp(silent, (3.0, 5.0), (1.0, 10.0))) == (15.0, 35.0)


def test_two_results_of_which_one_is_reached():
    def post(grads, cts):
        assert cts[1] is None
        return (grads[0] + cts[0],)

    layer = jhop.hook_fn(lambda x: (x * 3.0, x * 5.0), pre=lambda cts: (cts[0] * 10.0, None), post=post)
    assert float(jax.grad(lambda x: layer(x)[0])(2.0)) == 30.0 + 10.0


@pytest.mark.parametrize("post", [sevens, with_outs], ids=["one", "two"])
def test_under_vmap_scan_checkpoint_and_second_derivatives(post):
    layer = jhop.hook_fn(lambda x, w: jnp.sin(x) * w, pre=tens, post=post)

    def by_hand(x, w):
        @jax.custom_vjp
        def fn(x, w):
            return jnp.sin(x) * w

        def back(saved, ct):
            x, w = saved
            ct = ct * 10.0
            grads = (ct * w * jnp.cos(x), ct * jnp.sin(x))
            return sevens(grads) if post is sevens else with_outs(grads, ct)

        fn.defvjp(lambda x, w: (fn(x, w), (x, w)), back)
        return fn(x, w)

    xs, w = jnp.array([0.5, 1.5, 2.5]), jnp.float32(3.0)

    def mapped(fn):
        return lambda xs, w: jax.vmap(fn, in_axes=(0, None))(xs, w).sum()

    def scanned(fn):
        return lambda xs, w: jax.lax.scan(lambda total, x: (total + fn(x, w), None), 0.0, xs)[0]

    for way in (mapped, scanned, lambda fn: scanned(jax.checkpoint(fn)), lambda fn: mapped(jax.jit(fn))):
        both = jax.grad(way(layer), argnums=(0, 1))
        agree(both(xs, w), jax.grad(way(by_hand), argnums=(0, 1))(xs, w))
        agree(jhop.jit(both, fullgraph=True)(xs, w), jax.grad(way(by_hand), argnums=(0, 1))(xs, w))

    def second(fn):
        return jax.grad(lambda x, w: jax.grad(fn)(x, w) * w, argnums=(0, 1))

    # By `argnums=0` alone, w's gradient is None for the hook: by hand it is not there, either.
    one = jhop.hook_fn(lambda x: jnp.sin(x) * x, pre=tens, post=lambda grads: (grads[0] ** 2,))
    x = 0.5
    first = 10.0 * (np.cos(x) * x + np.sin(x))
    assert np.allclose(jax.grad(one)(x), first**2)
    assert np.allclose(jax.grad(jax.grad(one))(x), 2 * first * 10.0 * (2 * np.cos(x) - np.sin(x) * x))
    assert [leaf.shape for leaf in second(layer)(0.5, 3.0)] == [(), ()]


def test_second_derivative_with_two_arguments():
    layer = jhop.hook_fn(lambda x: x**3, post=lambda grads, ct: (grads[0] * ct * 2.0,))
    scaled = lambda x: layer(x) * 5.0  # noqa: E731
    assert float(jax.grad(scaled)(3.0)) == 27.0 * 5.0 * 5.0 * 2.0
    assert float(jax.grad(jax.grad(scaled))(3.0)) == 18.0 * 5.0 * 5.0 * 2.0
    stopped = jhop.hook_fn(lambda x: x**3, post=lambda grads, ct: (grads[0] * ct * 2.0,), stop=True)
    assert float(jax.grad(stopped)(3.0)) == 54.0
    assert float(jax.grad(jax.grad(stopped))(3.0)) == 0.0


def test_torch_complex():
    def post(grads, ct):
        return (grads[0] * ct * 1j,)

    def loss(z, **options):
        return jnp.abs(jhop.hook_fn(lambda z: z * z, pre=lambda ct: ct * 2j, post=post, **options)(z))

    z = 1 + 2j
    ct = (z * z / abs(z * z)) * 2j  # as PyTorch has it
    found = jax.grad(lambda z: loss(z, torch_complex=True))(jnp.complex64(z))
    assert np.allclose(found, np.conj(ct * np.conj(2 * z) * ct * 1j))
    ct = np.conj(z * z / abs(z * z)) * 2j
    assert np.allclose(jax.grad(loss)(jnp.complex64(z)), ct * 2 * z * ct * 1j)


class Norms:
    """Keeps, in plain Python, how often and on what it ran."""

    def __init__(self):
        self.runs = 0
        self.ratio = jnp.float32(0)

    def post(self, grads, ct):
        self.runs += 1
        self.ratio = grads[0] / ct


def test_python_state_is_lifted():
    norms = Norms()
    layer = jhop.hook_fn(mul, post=norms.post)
    step = jhop.jit(jax.grad(lambda x, w: layer(layer(x, w), w) * 2.0), fullgraph=True)
    for _ in range(3):
        assert float(step(jnp.float32(3.0), jnp.float32(5.0))) == 50.0
    assert (norms.runs, float(norms.ratio), step.versions()) == (6, 5.0, 1)


def test_a_module_called_as_a_function():
    class Linear:
        def __init__(self):
            self.w = jnp.arange(6.0).reshape(2, 3)

        def __call__(self, x):
            return self.w @ x

    model = Linear()
    hooked = jhop.hook_fn(model, pre=tens, post=with_outs)
    found = jax.grad(lambda x: hooked(x).sum())(jnp.ones(3))
    assert found.tolist() == (jnp.array([3.0, 5.0, 7.0]) * 10.0 + 100.0 + 150.0 + 20.0).tolist()
    assert jhop.hook_fn(mul).__name__ == "mul"
    assert jhop.hook_fn(functools.partial(mul, 2.0))(3.0) == 6.0


def test_equinox_and_flax_modules():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = jnp.ones(3)
    plain = jax.grad(lambda x: model(x).sum())(x)
    agree(jax.grad(lambda x: jhop.hook_fn(model, pre=tens, post=sevens)(x).sum())(x), plain * 70.0)
    by_model = eqx.filter_grad(lambda model: jhop.hook_fn(model, pre=tens)(x).sum())(model)
    agree(by_model.layers[0].weight, 10.0 * eqx.filter_grad(lambda model: model(x).sum())(model).layers[0].weight)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_in_shard_map_and_with_explicit_shardings(kind):
    mesh = make_mesh((4,), ("i",), kind)
    spec = jax.sharding.PartitionSpec("i")
    with jax.set_mesh(mesh):
        xs = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, spec))
        layer = jhop.hook_fn(lambda x: x * x, pre=tens, post=lambda grads, ct: (grads[0] + ct,))
        expected = (jnp.arange(8.0) * 20.0 + 10.0).tolist()
        assert jax.jit(jax.grad(lambda xs: layer(xs).sum()))(xs).tolist() == expected
        mapped = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)
        assert jax.jit(jax.grad(lambda xs: mapped(xs).sum()))(xs).tolist() == expected


def test_errors():
    with pytest.raises(jhop.HookError, match=r"^jhop.hook_fn: expected f to be a function, got int \(3\)"):
        jhop.hook_fn(3)
    with pytest.raises(jhop.HookError, match="^jhop.hook_fn: expected pre to be a hook or None, got int"):
        jhop.hook_fn(mul, 3)
    with pytest.raises(jhop.HookError, match="^jhop.hook_fn: expected post to be a hook or None, got str"):
        jhop.hook_fn(mul, post="clip")
    with pytest.raises(jhop.HookError, match=r"^jhop.hook_fn: expected post to take one argument .* hook `<"):
        jhop.hook_fn(mul, post=lambda a, b, c: None)
    with pytest.raises(jhop.HookError, match="^jhop.hook_fn: expected stop to be True or False, got 'no'"):
        jhop.hook_fn(mul, stop="no")

    def gradient(**hooks):
        return jax.grad(jhop.hook_fn(mul, **hooks), argnums=(0, 1))(3.0, 5.0)

    with pytest.raises(jhop.HookError, match=r"hook `<lambda>` .* must return a pytree like its cotangent"):
        gradient(post=lambda grads: grads[0])
    with pytest.raises(jhop.HookError, match=r"hook `<lambda>` .* must return a pytree like the gradients of the arg"):
        gradient(post=lambda grads, ct: grads[0])
    for post in (lambda grads: (grads[0], jnp.ones(3)), lambda grads, ct: (grads[0], jnp.ones(3))):
        with pytest.raises(jhop.HookError, match=r"hook `<lambda>` .* must return .* float32\[\].*float32\[3\]"):
            gradient(post=post)
    with pytest.raises(jhop.HookError, match="where it was given None"):
        jax.grad(jhop.hook_fn(mul, post=lambda grads: (grads[0], grads[0])))(3.0, 5.0)


def test_as_in_pytorch():
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(3, 2, bias=False)
    w = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    linear.weight.data = torch.tensor(w)
    linear.register_full_backward_pre_hook(lambda module, outs: (outs[0] * 10.0,))
    linear.register_full_backward_hook(lambda module, ins, outs: (ins[0] + outs[0].sum(),))
    x = torch.ones(3, requires_grad=True)
    (linear(x) ** 2).sum().backward()

    def loss(x, w):
        layer = jhop.hook_fn(lambda x: w @ x, pre=tens, post=lambda ins, out: (ins[0] + out.sum(),))
        return (layer(x) ** 2).sum()

    by_x, by_w = jax.grad(loss, argnums=(0, 1))(jnp.ones(3), jnp.asarray(w))
    np.testing.assert_allclose(by_x, x.grad.numpy(), rtol=1e-5)
    np.testing.assert_allclose(by_w, linear.weight.grad.numpy(), rtol=1e-5)
