"""The parts that print a graph whatever it computes: names, symbols, statements."""

import pytest

from jhop._text._namespace import Namespace, snake_case
from jhop._text._statements import RawCode, Stmt, is_bookkeeping, print_module, remove_unused, share_symbols
from jhop._text._symbols import ShapeEnv, constant, render, substitute, symbol

# Names.


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("L_inputs_", "l_inputs_"),
        ("L_sizes_0_", "l_sizes_0_"),
        ("s69", "s69"),
        ("MulBackward0", "mul_backward0"),
        ("AccumulateGrad", "accumulate_grad"),
        ("L_hooks_1_keywords_fn_keywords_aB", "l_hooks_1_keywords_fn_keywords_a_b"),
        ("X_ABC", "x_abc"),
    ],
)
def test_snake_case(target, name):
    assert snake_case(target) == name


@pytest.mark.parametrize(
    ("candidates", "names"),
    [
        (["add", "add", "add_1", "add"], ["add", "add_1", "add_2", "add_3"]),
        (["sum", "sum", "pow", "lambda"], ["sum_1", "sum_2", "pow_1", "lambda_1"]),
        # The numbers between are skipped, not used later.
        (["getitem_9", "getitem"], ["getitem_9", "getitem"]),
        (["getitem", "getitem_9", "getitem"], ["getitem", "getitem_9", "getitem_10"]),
        # A taken name starts over at 1, and leaves the counter where it ended.
        (["getitem", "getitem_14", "getitem_14", "getitem"], ["getitem", "getitem_14", "getitem_1", "getitem_2"]),
        (["a.b-c", "2x", "", "device"], ["a_b_c", "_2x", "_unnamed", "device_1"]),
        (["x_1_2", "x_1_2", "x_1"], ["x_1_2", "x_1_1", "x_1"]),
    ],
)
def test_make(candidates, names):
    namespace = Namespace()
    assert [namespace.make(candidate) for candidate in candidates] == names
    assert all(name in namespace for name in names)


def test_rename_burns_the_old_name():
    namespace = Namespace()
    for _ in range(3):
        namespace.make("getitem")
    assert namespace.rename(namespace.make("getitem"), "getitem_9") == "getitem_9"
    assert namespace.rename(namespace.make("getitem"), "aot1_tangents_1") == "aot1_tangents_1"
    assert [namespace.make("getitem") for _ in range(2)] == ["getitem_11", "getitem_12"]
    assert "getitem_3" in namespace


def test_rename_to_the_same_name_changes_nothing():
    namespace = Namespace()
    assert namespace.rename(namespace.make("mul"), "mul") == "mul"
    assert namespace.make("mul") == "mul_1"


def test_user_names_that_collide():
    # getitem = g * 2.0; size = getitem + g; result = size * size; add = result - g; mul = sin(add) * sin(size)
    namespace = Namespace()
    for name in ("getitem_11", "size"):
        namespace.make(name)
    steps = [("mul", "getitem"), ("add", "size"), ("mul", "result"), ("sub", "add"), ("sin", "sin"), ("sin", None)]
    namespace.make("getitem")
    for automatic, want in steps:
        name = namespace.make(automatic)
        if want:
            namespace.rename(name, want)
    assert namespace.rename(namespace.make("mul"), "mul") == "mul_3"
    assert all(name in namespace for name in ("getitem_12", "size_1", "add_1"))


# Expressions.

S2, S4, S24, S39, S45, S48, S79, S80 = (symbol(f"s{n}") for n in (2, 4, 24, 39, 45, 48, 79, 80))
ZF = symbol("zf70")
SIZE = symbol("s21", nonnegative=True)


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (S45 + 1, "s45 + 1"),
        (1 + S45, "s45 + 1"),
        ((S80 + 1) * 2, "2*s80 + 2"),
        (S79 + S48, "s48 + s79"),
        (S48 - 1, "s48 - 1"),
        (S39 * S24, "s24*s39"),
        (S45 + S4, "s4 + s45"),
        (ZF * 2, "2.0*zf70"),
        (ZF * 1, "1.0*zf70"),
        (ZF + 0.25, "zf70 + 0.25"),
        (S80 - 4, "s80 - 4"),
        ((S80 - 4) // 3, "((s80 - 4)//3)"),
        (S80 % 5, "PythonMod(s80, 5)"),
        ((S80 - 4) // 3 + S80 % 5, "(((s80 - 4)//3)) + (PythonMod(s80, 5))"),
        ((2 * S24) // 3, "((2*s24)//3)"),
        ((3 * ((2 * S24) // 3)) // 2, "((3*(((2*s24)//3)))//2)"),
        (S80 + S80 - S80, "s80"),
        (S80 - S80, "0"),
        (-S80 - 4, "-s80 - 4"),
        (10 - S80, "10 - s80"),
        (4 - S24 * S39, "-s24*s39 + 4"),
        (-((S80 - 4) // 3), "-(((s80 - 4)//3))"),
        (S80 * (S80 + 1), "s80*(s80 + 1)"),
        ((S80 + 1) ** 2, "(s80 + 1)**2"),
        (S80**2 + S80, "s80**2 + s80"),
        (S24 + S39**2, "s24 + s39**2"),
        (S24**0, "1"),
        ((S80 - 6) // 3, "((s80//3)) - 2"),
        ((2 * S80) // 4, "(s80//2)"),
        (S80 // 2 // 3, "(s80//6)"),
        (S80 // S24, "(s80//s24)"),
        (S80 // -3, "(s80//(-3))"),
        (7 // S80, "(7//s80)"),
        ((6 * S80 + 4) // 2, "3*s80 + 2"),
        ((6 * S80) % 3, "0"),
        (SIZE % 2, "Mod(s21, 2)"),
        ((SIZE - 1) % 2, "PythonMod(s21 - 1, 2)"),
        (S80 / 2, "IntTrueDiv(s80, 2)"),
        (ZF / 2, "FloatTrueDiv(zf70, 2.0)"),
        (S80 * 0.5, "0.5*ToFloat(s80)"),
        (ZF**2, "FloatPow(zf70, 2.0)"),
        (2**S80, "PowByNatural(2, s80)"),
        (constant(-7) // 2, "-4"),
        (constant(1.5) + 0.25, "1.75000000000000"),
        (ZF + 1e-7, "zf70 + 1.0e-7"),
        (ZF + 1e20, "zf70 + 1.0e+20"),
        (ZF - 0.1 - 0.2, "zf70 - 0.3"),
    ],
    ids=str,
)
def test_expression_text(expr, text):
    assert str(expr) == text


def test_expressions_are_values():
    assert S80 + 1 == 1 + symbol("s80")
    assert len({S80 + 1, 1 + S80, S80}) == 2
    assert (S80.name, (S80 + 1).name, (S80 * 1.0).name) == ("s80", None, None)
    assert (constant(3).value, S80.value, (S80 - S80).value) == (3, None, 0)
    assert ((S80 // S24) + ZF).symbols == {"s80", "s24", "zf70"}


def test_render_replaces_symbols():
    replaced = {"s80": "s21", "s24": 3, "s39": S2 * S4}
    resolve = lambda name: replaced.get(name, name)  # noqa: E731
    assert render(S80 + 1, resolve) == "s21 + 1"
    assert render(S79 + S80, resolve) == "s21 + s79"
    assert render(S24, resolve) == "3"
    assert render((S24 + 1) // 2 + S39, resolve) == "s2*s4 + 2"
    assert render((S80 + 1) * (S79 + 2), resolve) == "s21*s79 + 2*s21 + s79 + 2"
    assert render((S79 + 1) * (S48 + 2), resolve) == "(s48 + 2)*(s79 + 1)"
    assert render(5, resolve) == "5"
    assert substitute(S79, resolve) is S79


# Symbols.


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("L['inputs'][0].size()[0]", 21),
        ("L['inputs'][0].size()[1]", 41),
        ("L['inputs'][1].size()[0]", 35),
        ("L['sizes'][0].size()[1]", 69),
        ("L['sizes'][1].size()[1]", 79),
        ("L['sizes'][2].size()[1]", 94),
        ("L['hooks'][1].keywords['fn'].keywords['obj'].counter", 45),
        ("L['hooks'][1].keywords['fn'].keywords['box'].d['k']", 4),
        ("L['hooks'][1].__self__.calls", 44),
        ("L['hooks'][0].__closure__[0].cell_contents.__closure__[0].cell_contents.n", 19),
    ],
)
def test_symbol_is_hashed_from_its_source(source, number):
    assert ShapeEnv().symbol_for_source(source) == f"s{number}"
    assert ShapeEnv().symbol_for_source(source, prefix="zf") == f"zf{number}"


def test_ints_and_floats_share_the_numbers_of_symbols():
    env = ShapeEnv()
    env.fresh("L['sizes'][0].size()[1]", 3)
    float_state = env.fresh("L['hooks'][1].keywords['fn'].keywords['box'].w", 1.5, "zf")
    assert str(float_state + 0.25) == "zf70 + 0.25"
    assert env.values == {"s69": 3, "zf70": 1.5}


def test_equal_input_dims_share_a_symbol():
    env = ShapeEnv()
    dims = [env.input_dim(f"L['inputs'][0].size()[{i}]", value) for i, value in enumerate((3, 1, 3, 0))]
    assert [str(dim) for dim in dims] == ["s21", "1", "s21", "0"]


def test_fresh_symbols_are_never_shared():
    env = ShapeEnv()
    assert str(env.fresh("L['sizes'][0].size()[1]", 3)) == "s69"
    assert str(env.fresh("L['hooks'][0].calls", 1)) == "s80"
    assert str(env.input_dim("L['inputs'][0].size()[0]", 3)) == "s21"


def env_of(**values):
    """An environment in which each symbol has the given value."""
    env = ShapeEnv()
    env.values.update(values)
    return env


@pytest.mark.parametrize(
    ("values", "left", "right", "loser", "winner"),
    [
        ({"s21": 3, "s69": 3}, "s21", "s69", "s69", "s21"),
        ({"s21": 3, "s69": 3}, "s69", "s21", "s69", "s21"),
        # As strings: "s4" < "s45" < "s5".
        ({"s45": 3, "s5": 3}, "s45", "s5", "s5", "s45"),
        ({"s4": 3, "s45": 3}, "s45", "s4", "s45", "s4"),
    ],
)
def test_unify_keeps_the_smaller_name(values, left, right, loser, winner):
    env = env_of(**values)
    assert env.unify(symbol(left), symbol(right)) == loser
    assert render(symbol(loser), env.resolve) == winner
    assert render(symbol(winner), env.resolve) == winner


def test_unify_replaces_the_larger_value():
    env = env_of(s24=2, s39=6, s1=12)
    assert env.unify(S24 * S39, symbol("s1")) == "s1"
    assert render(symbol("s1"), env.resolve) == "s24*s39"
    assert env.unify(S39, S24 + 4) == "s39"
    assert render(symbol("s1"), env.resolve) == "s24**2 + 4*s24"


def test_unify_with_a_number():
    env = env_of(s21=3, s69=3)
    env.unify(symbol("s21"), symbol("s69"))
    assert env.unify(2 * symbol("s69"), 6) == "s21"
    assert render(symbol("s69") + 1, env.resolve) == "4"
    with pytest.raises(ValueError, match=r"sizes s69 and 4 must be equal, but are 3 and 4\."):
        env.unify(symbol("s69"), 4)


def test_unify_leaves_alone_what_it_cannot_solve():
    env = env_of(s24=2, s39=6, s80=7)
    assert env.unify(S39, S39) is None
    assert env.unify(S80 // 2, 3) is None
    assert env.unify(S39, S24 // 2 + 5) is None
    assert env.unify(S80 + S24, S80 * S24 - 5) is None
    assert env.unify(2 * S80, S24 + 12) is None
    assert env.unify(S24 * S39, 12) is None
    assert [render(s, env.resolve) for s in (S24, S39, S80)] == ["s24", "s39", "s80"]


# Statements.


def small_graph():
    """What a hook that squares and counts leaves of a gradient; by name."""
    inputs = Stmt("placeholder", "l_inputs_", "L_inputs_", placeholder_kind="list")
    s69 = Stmt("placeholder", "s69", "s69", annotation="Sym(s21)")
    sizes = Stmt("placeholder", "l_sizes_0_", "L_sizes_0_", annotation="f32[0, s21]")
    getitem = Stmt("call_function", "getitem", "getitem", (inputs, 0), annotation="f32[s21]", origin="list")
    getitem_1 = Stmt("call_function", "getitem_1", "getitem", (inputs, 1), annotation="f32[s21]", origin="list")
    size = Stmt("call_method", "size", "size", (sizes, 1), annotation="Sym(s21)", origin="size")
    meta = ((None, RawCode("device(type='cpu')"), 6), [size], False)
    outputs = Stmt("call_function", "validate_outputs", "torch_validate_outputs", ([getitem], [meta]), origin="root")
    getitem_9 = Stmt("call_function", "getitem_9", "getitem", (outputs, 0), annotation="f32[s21]", origin="root")
    result = Stmt("call_function", "result", "*", (getitem_9, getitem_9), annotation="f32[s21]", origin="hook")
    grads = Stmt("call_function", "accumulate_grad", "torch_AccumulateGrad", ([result], getitem_1, None), origin="acc")
    getitem_11 = Stmt("call_function", "getitem_11", "getitem", (grads, 0), annotation="f32[s21]", origin="acc")
    done = Stmt("output", "output", "output", ((getitem_11,),))
    return [inputs, s69, sizes, getitem, getitem_1, size, outputs, getitem_9, result, grads, getitem_11, done]


SMALL_TEXT = """\
class GraphModule(torch.nn.Module):
    def forward(self, L_inputs_ : list, s69: "Sym(s21)", L_sizes_0_: "f32[0, s21]"):
        l_inputs_ = L_inputs_
        l_sizes_0_ = L_sizes_0_

        getitem: "f32[s21]" = l_inputs_[0]
        getitem_1: "f32[s21]" = l_inputs_[1];  l_inputs_ = None

        size: "Sym(s21)" = l_sizes_0_.size(1);  l_sizes_0_ = None

        validate_outputs = torch_validate_outputs([getitem], [((None, device(type='cpu'), 6), [size], False)]);  \
getitem = size = None
        getitem_9: "f32[s21]" = validate_outputs[0];  validate_outputs = None

        result: "f32[s21]" = getitem_9 * getitem_9;  getitem_9 = None

        accumulate_grad = torch_AccumulateGrad([result], getitem_1, None);  result = getitem_1 = None
        getitem_11: "f32[s21]" = accumulate_grad[0];  accumulate_grad = None
        return (getitem_11,)
"""


def test_print_module():
    assert print_module(small_graph()) == SMALL_TEXT


def test_a_renamed_statement_prints_its_new_name_everywhere():
    stmts = small_graph()
    next(stmt for stmt in stmts if stmt.name == "result").name = "cube"
    assert print_module(stmts) == SMALL_TEXT.replace("result", "cube")


def test_print_module_without_origins():
    grad = Stmt("placeholder", "grad_1", "grad_1", annotation="f32[2]")
    target = "torch__dynamo__trace_wrapped_higher_order_op_self_invoke"
    wrapped = Stmt("call_function", "trace_wrapped", target, (grad,), annotation="f32[2]")
    stmts = [grad, wrapped, Stmt("output", "output", "output", (wrapped,))]
    expected = """\
class _multiply_invoke(torch.nn.Module):
    def forward(self, grad_1: "f32[2]"):
        trace_wrapped: "f32[2]" = torch__dynamo__trace_wrapped_higher_order_op_self_invoke(grad_1);  grad_1 = None
        return trace_wrapped
"""
    assert print_module(stmts, class_name="_multiply_invoke") == expected
    assert print_module(stmts, outer="Module").startswith("class GraphModule(Module):\n")


def body_of(*stmts, inputs=()):
    """The lines between signature and return."""
    text = print_module([*inputs, *stmts, Stmt("output", "output", "output", ([],))])
    assert text.endswith("\n        return []\n")
    return [line.strip() for line in text.splitlines()[2:-1]]


def test_no_blank_line_opens_a_body():
    nodes = [Stmt("call_function", f"x_{i}", "f", (), origin=o) for i, o in enumerate("abba")]
    assert [bool(line) for line in body_of(*nodes)] == [True, False, True, True, False, True]


def test_no_origin_is_an_origin():
    nodes = [Stmt("call_function", f"x_{i}", "f", (), origin=o) for i, o in enumerate((None, None, "a", None))]
    assert [bool(line) for line in body_of(*nodes)] == [True, True, False, True, False, True]
    alias = Stmt("placeholder", "l_x_", "L_x_")
    assert body_of(nodes[0], inputs=[alias])[:2] == ["l_x_ = L_x_", ""]


A, B = (Stmt("placeholder", name, name) for name in "ab")
CPU, F64 = RawCode("device(type='cpu')"), RawCode("torch.float64")


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "code"),
    [
        ("+", (A, 1), {}, "x = a + 1"),
        ("-", (A, B), {}, "x = a - b"),
        ("-", (A,), {}, "x = -a"),
        ("**", (2.0, A), {}, "x = 2.0 ** a"),
        ("@", (A, B), {}, "x = a @ b"),
        ("<=", (A, 0), {}, "x = a <= 0"),
        ("getitem", (A, 0), {}, "x = a[0]"),
        ("getitem", (A, (slice(None, B, 2), None)), {}, "x = a[(slice(None, b, 2), None)]"),
        ("setitem", (A, 0, B), {}, "a[0] = b;  x = a"),
        ("+=", (A, 2.0), {}, "a += 2.0;  x = a"),
        ("torch.sin", (A,), {}, "x = torch.sin(a)"),
        ("torch.scalar_tensor", (A,), {"dtype": F64}, "x = torch.scalar_tensor(a, dtype = torch.float64)"),
        ("f", ((), (A,), [A, (B, "s")], CPU, True), {}, "x = f((), (a,), [a, (b, 's')], device(type='cpu'), True)"),
        ("f", (), {}, "x = f()"),
    ],
)
def test_call_function(target, args, kwargs, code):
    (line,) = body_of(Stmt("call_function", "x", target, args, kwargs), inputs=[A, B])
    assert line.partition(";  a =")[0].partition(";  b =")[0].partition(";  x = None")[0] == code


def test_call_method():
    stmt = Stmt("call_method", "reshape", "reshape", (A, 3, B), {"k": [B]}, annotation="f32[3, 2]")
    assert body_of(stmt, inputs=[A, B]) == ['reshape: "f32[3, 2]" = a.reshape(3, b, k = [b]);  a = b = reshape = None']


def test_in_place_statement_with_annotation():
    t = Stmt("call_function", "t", "*", (A, 1.0), annotation="f32[s21]")
    t_1 = Stmt("call_function", "t_1", "+=", (t, 2.0), annotation="f32[s21]")
    used = Stmt("call_function", "y", "f", (t_1,))
    assert body_of(t, t_1, used, inputs=[A])[1] == 't += 2.0;  t_1: "f32[s21]" = t;  t = None'


def test_deletions_follow_first_mention_and_a_value_nobody_uses_comes_last():
    x = Stmt("call_function", "x", "f", ([B, (A,)], B), {"k": A})
    assert body_of(x, inputs=[A, B]) == ["x = f([b, (a,)], b, k = a);  b = a = x = None"]


def test_what_is_returned_is_not_deleted():
    x = Stmt("call_function", "x", "f", (A,))
    y = Stmt("call_function", "y", "f", (x,))
    text = print_module([A, x, y, Stmt("output", "output", "output", ((x, y, None),))])
    assert text.splitlines()[2:] == ["        x = f(a);  a = None", "        y = f(x)", "        return (x, y, None)"]


def test_annotation_is_rendered_when_printed():
    env = env_of(s21=3, s69=3)

    class Late:
        def __str__(self):
            return f"f32[{render(symbol('s69'), env.resolve)}]"

    stmts = [Stmt("placeholder", "a", "a", annotation=Late()), Stmt("output", "output", "output", ((),))]
    assert '"f32[s69]"' in print_module(stmts)
    env.unify(symbol("s21"), symbol("s69"))
    assert '"f32[s21]"' in print_module(stmts)


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="statement `x` has op 'call_module', which does not print"):
        print_module([Stmt("call_module", "x", "x")])


# Passes.


def names(stmts):
    return [stmt.name for stmt in stmts]


def test_remove_unused_keeps_what_is_used():
    stmts = small_graph()
    assert remove_unused(stmts) == stmts


def test_remove_unused_sweeps_backwards():
    stmts = small_graph()
    inputs, sizes = stmts[0], stmts[2]
    size_1 = Stmt("call_method", "size_1", "size", (sizes, 0), annotation="Sym(s9)")
    add = Stmt("call_function", "add", "+", (size_1, 1), annotation="Sym(s9 + 1)")
    unused = Stmt("call_function", "getitem_2", "getitem", (inputs, 2))
    tensor = Stmt("call_function", "mul", "*", (inputs, 2), annotation="f32[s21]")
    item = Stmt("call_method", "item", "item", (tensor,), annotation="Sym(zuf0)")
    left = remove_unused([*stmts[:3], size_1, add, unused, tensor, item, *stmts[3:]])
    # A tensor that nobody uses stays: only bookkeeping goes.
    assert left == [*stmts[:3], tensor, *stmts[3:]]


def test_remove_unused_asks_pure():
    x = Stmt("call_function", "x", "f", (A,))
    done = Stmt("output", "output", "output", ((),))
    assert remove_unused([A, x, done]) == [A, x, done]
    assert remove_unused([A, x, done], pure=lambda stmt: True) == [done]


def test_a_symbol_stays_while_a_placeholder_carries_it():
    symbols = [Stmt("placeholder", name, name, annotation=f"Sym({of})") for name, of in
               (("s69", "s21"), ("s79", "s21"), ("s94", "s94"), ("s63", "3"))]  # fmt: skip
    sizes = Stmt("placeholder", "l_sizes_0_", "L_sizes_0_", annotation="f32[0, s21]")
    size = Stmt("call_method", "size", "size", (sizes, 1), annotation="Sym(s21)")
    used = [*symbols, sizes, size, Stmt("output", "output", "output", ((size,),))]
    # One placeholder per symbol, and none for a symbol that became a number or that nothing carries.
    assert names(remove_unused(used)) == ["s69", "l_sizes_0_", "size", "output"]
    unused = [*symbols, sizes, size, Stmt("output", "output", "output", ((),))]
    assert names(remove_unused(unused)) == ["output"]


def test_a_list_carries_the_symbols_that_the_caller_names():
    inputs = Stmt("placeholder", "l_inputs_", "L_inputs_", placeholder_kind="list")
    s69 = Stmt("placeholder", "s69", "s69", annotation="Sym(s21)")
    getitem = Stmt("call_function", "getitem", "getitem", (inputs, 0), annotation="f32[s21]")
    stmts = [inputs, s69, getitem, Stmt("output", "output", "output", ((getitem,),))]
    assert s69 not in remove_unused(stmts)
    assert remove_unused(stmts, symbols_of=lambda stmt: ["s21"]) == stmts


def test_a_dtype_is_no_symbol():
    u8 = Stmt("placeholder", "u8", "u8", annotation="Sym(u8)")
    data = Stmt("placeholder", "data", "data", annotation="u8[3]")
    assert names(remove_unused([u8, data, Stmt("output", "output", "output", (data,))])) == ["data", "output"]


def test_is_bookkeeping():
    assert is_bookkeeping(Stmt("call_function", "add", "+", (1, 2), annotation="Sym(s1 + 2)"))
    assert not is_bookkeeping(Stmt("call_function", "add", "+", (1, 2), annotation="f32[s1]"))
    assert not is_bookkeeping(Stmt("call_method", "sum_1", "sum", (A,), annotation="f32[]"))
    assert not is_bookkeeping(A)


def sharing_graph(*annotations):
    sizes = Stmt("placeholder", "l_sizes_0_", "L_sizes_0_", annotation="f32[0, s21]")
    nodes = [Stmt("call_method", f"size_{i}", "size", (sizes, 1), annotation=a) for i, a in enumerate(annotations)]
    use = Stmt("call_function", "f", "f", ([(nodes, slice(None, nodes[-1]))],), {"k": nodes[-1]})
    return sizes, nodes, use


def test_share_symbols_keeps_the_first_of_equal_expressions():
    sizes, nodes, use = sharing_graph("Sym(s21)", "Sym(s41)", "Sym(s21)")
    assert share_symbols([sizes, *nodes, use], {}) == [sizes, *nodes[:2], use]
    assert use.args == ([([nodes[0], nodes[1], nodes[0]], slice(None, nodes[0]))],)
    assert use.kwargs == {"k": nodes[0]}


def test_share_symbols_prefers_the_placeholder():
    s40 = Stmt("placeholder", "s40", "s40", annotation="Sym(s40)")
    sizes, nodes, use = sharing_graph("Sym(s40)", "Sym(2*s40)")
    assert share_symbols([s40, sizes, *nodes, use], {"s40": s40}) == [s40, sizes, nodes[1], use]
    assert use.args[0][0][0] == [s40, nodes[1]]


def test_share_symbols_leaves_numbers_apart():
    sizes, nodes, use = sharing_graph("Sym(2)", "Sym(2)", "Sym(1.75000000000000)", "Sym(1.75000000000000)")
    assert share_symbols([sizes, *nodes, use], {}) == [sizes, *nodes, use]
