"""The seven behaviours that jhop began with, at numbers which an implementation that ignores hooks would miss.

x = [0.5, 0.25], y = [3, -2] and the incoming gradient is [2, 5]. Without its hook x would get [6, -10] from a product
and [2, 5] from a sum; with it, [36, 100] and [4, 25].
"""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

import jhop

GRAD_OUT = (2.0, 5.0)


def on_cpu(text):
    """A printed graph as it is on a CPU, where the expected ones were made."""
    return text.replace("device(type='cuda', index=0)", "device(type='cpu')")


def own_backend(gm, example_inputs):
    """A backend that is no more than the graph itself."""
    return lambda *flat: gm(*flat)


BACKENDS = ["eager", "aot_eager", "xla", "inductor", own_backend]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b if isinstance(b, str) else b.__name__)


def _multiply(x):
    return x * x


def _multiply_invoke(grad):
    return jhop.trace_wrapped(grad, fn=_multiply)


def count_and_multiply(x, obj):
    obj.counter = obj.counter + 1
    return _multiply(x)


def invoke(grad, fn):
    return jhop.trace_wrapped(grad, fn=fn)


def print_and_multiply(x):
    print("heard")
    return _multiply(x)


def leaves():
    return jhop.tensor([0.5, 0.25], requires_grad=True), jhop.tensor([3.0, -2.0], requires_grad=True)


def grad_out():
    return jhop.tensor(GRAD_OUT)


def hooked_product(x, y):
    x.register_hook(_multiply_invoke)
    return x * y


def hooked_sum(x, y):
    x.register_hook(_multiply_invoke)
    return x + y


class Compiler:
    """A `compiler_fn` that keeps the text of every graph it is given."""

    def __init__(self):
        self.texts = []

    def __call__(self, gm):
        return jhop.compile(gm, backend=self.backend, fullgraph=True, dynamic=True)

    def backend(self, gm, example_inputs):
        self.texts.append(jhop.testing.normalize_gm(on_cpu(gm.print_readable(False))))
        return jhop.backends.xla(gm, example_inputs)


@pytest.fixture
def compiler():
    return Compiler()


@pytest.fixture(autouse=True)
def aot_ids():
    with jhop.testing.fresh_aot_ids():
        yield


def assert_grads(x, y, of_x, of_y):
    assert {"x": x.grad.tolist(), "y": y.grad.tolist()} == {"x": of_x, "y": of_y}


# The graphs, as PyTorch prints them.

OPAQUE_TEXT = """\
class _multiply_invoke(torch.nn.Module):
    def forward(self, grad_1: "f32[2]"):
        trace_wrapped: "f32[2]" = torch__dynamo__trace_wrapped_higher_order_op_self_invoke(grad_1);  grad_1 = None
        return trace_wrapped
"""

SUM_TEXT = """\
class GraphModule(torch.nn.Module):
    def forward(self, L_inputs_ : list, s69: "Sym(s21)", L_sizes_0_: "f32[0, s21]"):
        l_inputs_ = L_inputs_
        l_sizes_0_ = L_sizes_0_

        getitem: "f32[s21]" = l_inputs_[0]
        getitem_1: "f32[s21]" = l_inputs_[1]
        getitem_2: "f32[s21]" = l_inputs_[2];  l_inputs_ = None

        size: "Sym(s21)" = l_sizes_0_.size(1);  l_sizes_0_ = None

        validate_outputs = torch__dynamo_compiled_autograd_ops_validate_outputs([getitem], [((None, None, device(type='cpu'), 6, 0, None), [size], False, 6)]);  getitem = size = None
        getitem_9: "f32[s21]" = validate_outputs[0];  validate_outputs = None

        call_aot_bwd_prologue = torch__dynamo_compiled_autograd_call_aot_bwd_prologue((), [], getitem_9);  getitem_9 = None
        aot{id}_tangents_1: "f32[s21]" = call_aot_bwd_prologue[0];  call_aot_bwd_prologue = None

        accumulate_grad = torch__dynamo_compiled_autograd_ops_AccumulateGrad([aot{id}_tangents_1], getitem_1, None, False);  getitem_1 = None
        getitem_11: "f32[s21]" = accumulate_grad[0];  accumulate_grad = None

        result: "f32[s21]" = aot{id}_tangents_1 * aot{id}_tangents_1;  aot{id}_tangents_1 = None

        accumulate_grad_1 = torch__dynamo_compiled_autograd_ops_AccumulateGrad([result], getitem_2, None, False);  result = getitem_2 = None
        getitem_12: "f32[s21]" = accumulate_grad_1[0];  accumulate_grad_1 = None
        return (getitem_11, getitem_12)
"""  # noqa: E501

COUNTER_TEXT = """\
class GraphModule(torch.nn.Module):
    def forward(self, L_inputs_ : list, s69: "Sym(s21)", L_sizes_0_: "f32[0, s21]", L_hooks_1_keywords_fn_keywords_obj_counter: "Sym(s45)"):
        l_inputs_ = L_inputs_
        l_sizes_0_ = L_sizes_0_
        l_hooks_1_keywords_fn_keywords_obj_counter = L_hooks_1_keywords_fn_keywords_obj_counter

        getitem: "f32[s21]" = l_inputs_[0]
        getitem_1: "f32[s21]" = l_inputs_[1]
        getitem_2: "f32[s21]" = l_inputs_[2];  l_inputs_ = None

        size: "Sym(s21)" = l_sizes_0_.size(1);  l_sizes_0_ = None

        validate_outputs = torch__dynamo_compiled_autograd_ops_validate_outputs([getitem], [((None, None, device(type='cpu'), 6, 0, None), [size], False, 6)]);  getitem = size = None
        getitem_9: "f32[s21]" = validate_outputs[0];  validate_outputs = None

        call_aot_bwd_prologue = torch__dynamo_compiled_autograd_call_aot_bwd_prologue((), [], getitem_9);  getitem_9 = None
        aot0_tangents_1: "f32[s21]" = call_aot_bwd_prologue[0];  call_aot_bwd_prologue = None

        accumulate_grad = torch__dynamo_compiled_autograd_ops_AccumulateGrad([aot0_tangents_1], getitem_1, None, False);  getitem_1 = None
        getitem_11: "f32[s21]" = accumulate_grad[0];  accumulate_grad = None

        add: "Sym(s45 + 1)" = l_hooks_1_keywords_fn_keywords_obj_counter + 1;  l_hooks_1_keywords_fn_keywords_obj_counter = None

        result: "f32[s21]" = aot0_tangents_1 * aot0_tangents_1;  aot0_tangents_1 = None

        accumulate_grad_1 = torch__dynamo_compiled_autograd_ops_AccumulateGrad([result], getitem_2, None, False);  result = getitem_2 = None
        getitem_12: "f32[s21]" = accumulate_grad_1[0];  accumulate_grad_1 = None
        return (getitem_11, getitem_12, add)
"""  # noqa: E501


# 1. Eager.


def test_eager_hook_sees_the_gradient_of_its_tensor():
    x, y = leaves()
    hooked_product(x, y).backward(grad_out())
    assert_grads(x, y, [36.0, 100.0], [1.0, 1.25])


def test_trace_wrapped_on_values_calls_its_function():
    assert _multiply_invoke(jnp.array([3.0, -2.0])).tolist() == [9.0, 4.0]


# 2. A compiled forward.


@each_backend
def test_compiled_product(backend):
    x, y = leaves()
    jhop.compile(hooked_product, backend=backend)(x, y).backward(grad_out())
    assert_grads(x, y, [36.0, 100.0], [1.0, 1.25])


@each_backend
def test_compiled_product_of_an_outside_hook(backend):
    x, y = leaves()
    x.register_hook(_multiply_invoke)
    jhop.compile(lambda x, y: x * y, backend=backend)(x, y).backward(grad_out())
    assert_grads(x, y, [36.0, 100.0], [1.0, 1.25])


# 3 and 4. make_fx, on a value and on a gradient.


def test_captured_call_runs():
    gm = jhop.make_fx(_multiply_invoke)(jnp.array([0.5, 0.5]))
    assert gm(jnp.array([0.5, 0.25])).tolist() == [0.25, 0.0625]


def test_captured_call_of_a_tensors_value():
    x, _ = leaves()
    assert jhop.make_fx(_multiply_invoke)(x.value)(x.value).tolist() == [0.25, 0.0625]


def test_captured_call_prints_as_one_opaque_call():
    gm = jhop.make_fx(_multiply_invoke)(jnp.array([0.5, 0.25]))
    assert jhop.testing.normalize_gm(gm.print_readable(False)) == OPAQUE_TEXT


def test_captured_call_of_a_gradient_runs():
    x, _ = leaves()
    z = x * x
    (z + z).backward(grad_out())
    assert x.grad.tolist() == [4.0, 5.0]
    assert jhop.make_fx(_multiply_invoke)(x.grad)(x.grad).tolist() == [16.0, 25.0]


def test_captured_call_of_a_gradient_prints_alike():
    x, _ = leaves()
    (x * x).backward(grad_out())
    gm = jhop.make_fx(_multiply_invoke)(x.grad)
    assert jhop.testing.normalize_gm(gm.print_readable(False)) == OPAQUE_TEXT


# 5. Compiled autograd.


@each_backend
def test_captured_backward_of_a_sum(backend, compiler):
    x, y = leaves()
    out = jhop.compile(hooked_sum, backend=backend)(x, y)
    with jhop.compiled_autograd.enable(compiler):
        out.backward(grad_out())
    assert_grads(x, y, [4.0, 25.0], [2.0, 5.0])


@each_backend
def test_captured_backward_of_a_product(backend, compiler):
    x, y = leaves()
    out = jhop.compile(hooked_product, backend=backend)(x, y)
    with jhop.compiled_autograd.enable(compiler):
        out.backward(grad_out())
    assert_grads(x, y, [36.0, 100.0], [1.0, 1.25])


@each_backend
def test_captured_backward_compiles_one_graph(backend, compiler):
    out = jhop.compile(hooked_sum, backend=backend)(*leaves())
    with jhop.compiled_autograd.enable(compiler):
        out.backward(grad_out())
    assert len(compiler.texts) == 1


@pytest.mark.parametrize(("backend", "aot_id"), [("aot_eager", 1), ("inductor", 3), ("xla", 5)])
def test_captured_backward_prints_as_in_pytorch(backend, aot_id):
    # Numbers of compiles go on over the backends: each but "eager" takes one for the forward and one for the backward.
    for before in ("eager", "aot_eager", "inductor", "xla"):
        jhop.reset()
        compiler = Compiler()
        out = jhop.compile(hooked_sum, backend=before)(*leaves())
        with jhop.compiled_autograd.enable(compiler):
            out.backward(grad_out())
        if before == backend:
            break
    assert compiler.texts == [SUM_TEXT.replace("{id}", str(aot_id))]


# 6. Hooks with state.


@pytest.fixture
def counted():
    """(counter object, x with the counting hook, y)."""
    obj = types.SimpleNamespace(counter=0)
    x, y = leaves()
    x.register_hook(functools.partial(invoke, fn=functools.partial(count_and_multiply, obj=obj)))
    return obj, x, y


def run_counted(counted, compiler, backend, where):
    """One backward per letter of `where`: "c" under compiled autograd, "e" outside."""
    _, x, y = counted
    fn = jhop.compile(lambda x, y: x + y, backend=backend, fullgraph=True)
    for place in where:
        out = fn(x, y)
        if place == "c":
            with jhop.compiled_autograd.enable(compiler):
                out.backward(grad_out())
        else:
            out.backward(grad_out())


@each_backend
@pytest.mark.parametrize("where", ["c", "cee", "ecc"])
def test_counter_is_written_back(counted, compiler, backend, where):
    run_counted(counted, compiler, backend, where)
    assert counted[0].counter == len(where)


@each_backend
def test_counter_stays_a_python_int(counted, compiler, backend):
    run_counted(counted, compiler, backend, "cec")
    assert type(counted[0].counter) is int


@each_backend
def test_gradients_of_counted_backwards_add_up(counted, compiler, backend):
    run_counted(counted, compiler, backend, "cec")
    assert_grads(*counted[1:], [12.0, 75.0], [6.0, 15.0])


@pytest.mark.parametrize("start", [0, 41, -7])
def test_counter_goes_on_from_any_number_on_one_graph(counted, compiler, start):
    run_counted(counted, compiler, "xla", "c")
    counted[0].counter = start
    counted[1].grad = counted[2].grad = None
    run_counted(counted, compiler, "xla", "c")
    assert counted[0].counter == start + 1


def test_counter_costs_no_second_trace(compiler):
    obj = types.SimpleNamespace(counter=0)
    hook = functools.partial(invoke, fn=functools.partial(count_and_multiply, obj=obj))
    x, y = leaves()
    x.register_hook(hook)
    fn = jhop.compile(lambda x, y: x + y, fullgraph=True)
    for _ in range(4):
        x.grad = y.grad = None
        with jhop.compiled_autograd.enable(compiler):
            fn(x, y).backward(grad_out())
    assert (obj.counter, len(compiler.texts)) == (4, 1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_counter_prints_as_in_pytorch(counted, compiler, backend):
    run_counted(counted, compiler, backend, "c")
    assert compiler.texts == [COUNTER_TEXT]


# 7. Hooks that cannot be captured.


@pytest.fixture(params=BACKENDS, ids=lambda b: b if isinstance(b, str) else b.__name__)
def printing(request):
    """(counter object, x, y, a sum whose hooks on x count, then print)."""
    obj = types.SimpleNamespace(counter=0)
    x, y = leaves()

    def fn(x, y):
        x.register_hook(functools.partial(count_and_multiply, obj=obj))
        x.register_hook(lambda grad: jhop.trace_wrapped(grad, fn=print_and_multiply))
        return x + y

    out = jhop.compile(fn, backend=request.param, fullgraph=True)(x, y)
    return obj, x, y, out


def refuse(out, compiler):
    with jhop.compiled_autograd.enable(compiler):
        with pytest.raises(jhop.Unsupported, match="print") as caught:
            out.backward(grad_out())
    return caught.value


def test_print_in_a_hook_is_refused_by_name(printing, compiler):
    refuse(printing[-1], compiler)


def test_refusal_says_which_hook_and_line(printing, compiler):
    message = str(refuse(printing[-1], compiler))
    assert "print_and_multiply" in message and 'print("heard")' in message and "test_seed.py" in message


def test_refused_hook_prints_nothing(printing, compiler, capsys):
    refuse(printing[-1], compiler)
    assert capsys.readouterr() == ("", "")


def test_refused_backward_assigns_no_gradient(printing, compiler):
    refuse(printing[-1], compiler)
    assert (printing[1].grad, printing[2].grad) == (None, None)


def test_refused_backward_keeps_earlier_gradients(printing, compiler):
    before = jnp.array([7.0, 8.0])
    printing[1].grad = before
    refuse(printing[-1], compiler)
    assert np.array_equal(printing[1].grad, before) and printing[2].grad is None


def test_refused_backward_changes_no_state(printing, compiler):
    refuse(printing[-1], compiler)
    assert printing[0].counter == 0


def test_refused_backward_compiles_nothing(printing, compiler):
    refuse(printing[-1], compiler)
    assert compiler.texts == []


def test_refused_context_raises_through_the_with_statement(printing, compiler):
    with pytest.raises(jhop.Unsupported, match="print"), jhop.compiled_autograd.enable(compiler):
        printing[-1].backward(grad_out())


def test_print_in_a_hook_prints_eagerly(capsys):
    x, y = leaves()
    x.register_hook(print_and_multiply)
    (x * y).backward(grad_out())
    assert capsys.readouterr().out == "heard\n"
