"""Python state of hooks: written as eager writes it, exactly, all or nothing, and with no symbol left behind."""

import collections
import contextlib
import dataclasses
import enum
import functools
import gc
import heapq
import itertools
import math
import operator
import time
import types
import warnings
from types import SimpleNamespace as Box

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

X = np.array([1.0, 2.0, 3.0], np.float32)


def gradient(hook):
    return jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum())


def frozen(value, deep=8):
    """What a value is, types and all, as something that can be compared and that no later change reaches."""
    assert type(value).__name__ != "Scalar", "a symbol was left behind"
    assert not isinstance(value, jax.core.Tracer), "a tracer was left behind"
    if deep == 0 or type(value) in (str, bool, type(None)) or callable(value):
        return type(value).__name__
    if isinstance(value, jax.Array):
        return ("jax", str(value.dtype), np.asarray(value).tolist())
    if isinstance(value, (np.ndarray, np.generic)):
        return (type(value).__name__, str(value.dtype), [frozen(v, deep - 1) for v in np.ravel(value).tolist()])
    if type(value) in (int, float):
        return repr(value)
    if isinstance(value, dict):
        return (type(value).__name__, [(frozen(k, deep - 1), repr(k), frozen(v, deep - 1)) for k, v in value.items()])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(str(frozen(v, deep - 1)) for v in value))
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value).__name__, getattr(value, "maxlen", None), [frozen(v, deep - 1) for v in value])
    return (type(value).__name__, frozen(vars(value), deep - 1)) if hasattr(value, "__dict__") else repr(value)


def history(case, compiled, steps=4):
    """[(gradient, state)] per step."""
    hook, snap, *rest = case()
    between = rest[0] if rest else lambda i: None
    fn = gradient(hook)
    if compiled:
        fn = jhop.jit(fn, fullgraph=True)
    found = []
    for i in range(steps):
        if i:
            between(i)
        found.append((np.asarray(fn(X)).tolist(), frozen(snap())))
    return found


def same_as_eager(case, steps=4):
    want, got = history(case, False, steps), history(case, True, steps)
    for (want_grad, want_state), (got_grad, got_state) in zip(want, got, strict=True):
        assert got_state == want_state
        np.testing.assert_allclose(got_grad, want_grad, rtol=1e-6)


def same_as_eager_or_refused(case, steps=4):
    """Where lifting is more than jhop promises, an error is as good; anything else is not."""
    try:
        history(case, True, steps)
    except jhop.JhopError:
        return
    same_as_eager(case, steps)


def cases(*functions):
    return pytest.mark.parametrize("case", functions, ids=lambda fn: fn.__name__)


# Where state may live.


def attribute():
    box = Box(n=0)

    def hook(ct):
        box.n += 1
        return ct * box.n

    return hook, lambda: box


def partial_keyword():
    box = Box(n=0)

    def hook(ct, obj):
        obj.n += 1
        return ct * obj.n

    return functools.partial(hook, obj=box), lambda: box


def partial_position():
    box = Box(n=0)

    def hook(obj, ct):
        obj.n += 1
        return ct * obj.n

    return functools.partial(hook, box), lambda: box


def bound_method():
    class Counter:
        def __init__(self):
            self.n = 0

        def hook(self, ct):
            self.n += 1
            return ct * self.n

    counter = Counter()
    return counter.hook, lambda: counter


def callable_object():
    class Counter:
        def __init__(self):
            self.n = 0

        def __call__(self, ct):
            self.n += 1
            return ct * self.n

    counter = Counter()
    return counter, lambda: counter.n


def class_attribute():
    class Counter:
        n = 0

        def __call__(self, ct):
            type(self).n += 1
            return ct * self.n

    return Counter(), lambda: Counter.n


def instance_over_class_attribute():
    class Counter:
        n = 0

    counter = Counter()

    def hook(ct):
        counter.n += 1
        Counter.n += 5
        return ct * (counter.n + Counter.n)

    return hook, lambda: (counter.n, Counter.n)


def default_argument():
    def hook(ct, seen=[]):  # noqa: B006
        seen.append(len(seen))
        return ct * len(seen)

    return hook, lambda: hook.__defaults__


def keyword_default():
    def hook(ct, *, seen={"n": 0}):  # noqa: B006
        seen["n"] += 1
        return ct * seen["n"]

    return hook, lambda: hook.__kwdefaults__


def nonlocal_variable():
    n = 0

    def hook(ct):
        nonlocal n
        n += 1
        return ct * n

    return hook, lambda: n


def function_attribute():
    def hook(ct):
        hook.n = hook.__dict__.get("n", 0) + 1
        return ct * hook.n

    return hook, lambda: hook.__dict__


def slots():
    class Base:
        __slots__ = ("n",)

    class Slotted(Base):
        __slots__ = ("last", "x")

    obj = Slotted()
    obj.n, obj.x = 0, 1.5

    def hook(ct):
        obj.n += 1
        obj.x *= 2
        obj.last = ct
        return ct * obj.x

    return hook, lambda: (obj.n, obj.x, getattr(obj, "last", None))


def private_slot():
    class Slotted:
        __slots__ = ("__n",)

        def __init__(self):
            self.__n = 0

        def bump(self):
            self.__n += 1
            return self.__n

        def read(self):
            return self.__n

    obj = Slotted()
    return (lambda ct: ct * obj.bump()), obj.read


def dataclass_field():
    @dataclasses.dataclass
    class State:
        n: int = 0
        x: float = 0.5

    state = State()

    def hook(ct):
        state.n += 1
        state.x *= 1.5
        return ct * state.x

    return hook, lambda: state


def frozen_dataclass_replaced():
    @dataclasses.dataclass(frozen=True)
    class State:
        n: int = 0

    box = Box(state=State())

    def hook(ct):
        box.state = dataclasses.replace(box.state, n=box.state.n + 1)
        return ct * box.state.n

    return hook, lambda: box


def property_with_setter():
    class Clamped:
        def __init__(self):
            self._n = 0

        @property
        def n(self):
            return self._n

        @n.setter
        def n(self, value):
            self._n = min(value, 2)

    obj = Clamped()

    def hook(ct):
        obj.n += 1
        return ct * obj.n

    return hook, lambda: obj


def own_setattr():
    class Logged:
        def __init__(self):
            object.__setattr__(self, "n", 0)
            object.__setattr__(self, "log", [])

        def __setattr__(self, name, value):
            self.log.append(name)
            object.__setattr__(self, name, value * 2)

    obj = Logged()

    def hook(ct):
        obj.n = obj.n + 1
        return ct * obj.n

    return hook, lambda: obj


def super_methods():
    class Base:
        def __init__(self):
            self.n = 0

        def step(self):
            self.n += 1

    class Middle(Base):
        def step(self):
            super().step()
            self.n += 10

    class Last(Middle):
        def step(self):
            super().step()
            self.n += 100

    obj = Last()

    def hook(ct):
        obj.step()
        return ct * obj.n

    return hook, lambda: obj


def dict_items():
    table = {"n": 0, "x": 0.5}

    def hook(ct):
        table["n"] += 1
        table["x"] = table["x"] * 2
        table["new"] = ct
        return ct * table["x"]

    return hook, lambda: table


def list_items():
    numbers = [3, 1, 2]

    def hook(ct):
        numbers[0] += 5
        numbers.sort()
        return ct * numbers[0]

    return hook, lambda: numbers


def list_append():
    seen = []
    return (lambda ct: seen.append(ct)), lambda: seen


def list_added_to_another():
    seen = [1.0]

    def hook(ct):
        window = [0.5] + seen
        seen.append(2.0)
        return ct * len(window)

    return hook, lambda: seen


def list_extended_by_itself():
    seen = [1.0]

    def hook(ct):
        seen.extend(seen)
        return ct * 2

    return hook, lambda: seen


def chain_of_new_objects():
    box = Box(n=0, last=None)

    def hook(ct):
        box.n += 1
        box.last = Box(inside=box.n)
        for _ in range(10):
            box.last = Box(inside=box.last)
        return ct * box.n

    return hook, lambda: box


def deque_of_a_subclass():
    class Ring(collections.deque):
        def clear(self):
            raise RuntimeError("not called by the hook")

        extend = __setitem__ = clear

    ring = Ring([1.0, 2.0])

    def hook(ct):
        ring.append(ring[0] + 1)
        return ct * ring.popleft()

    return hook, lambda: list(ring)


def heap():
    numbers = [3, 1, 2]

    def hook(ct):
        value = heapq.heappop(numbers)
        heapq.heappush(numbers, value + 5)
        return ct * value

    return hook, lambda: numbers


def set_items():
    box = Box(n=0, seen=set())

    def hook(ct):
        box.n += 1
        box.seen.add(box.n)
        return ct * len(box.seen)

    return hook, lambda: box


def deque_items():
    ring = collections.deque([1.0], maxlen=3)

    def hook(ct):
        ring.append(ring[-1] * 2)
        ring.rotate(1)
        return ct * ring[0]

    return hook, lambda: ring


def counter_dict():
    counts = collections.Counter(a=1)

    def hook(ct):
        counts["a"] += 1
        counts.update(["b"])
        return ct * counts["a"]

    return hook, lambda: counts


def nested_containers():
    tree = {"a": [1, {"b": [2.0]}]}

    def hook(ct):
        tree["a"][1]["b"][0] *= 2
        tree["a"][0] += 1
        tree["a"].append((tree["a"][0],))

    return hook, lambda: tree


def list_of_itself():
    items = [1.0]
    items.append(items)

    def hook(ct):
        items[1][1][0] += 1
        return ct * items[0]

    return hook, lambda: items[0]


def jax_array():
    box = Box(total=jnp.zeros(3))

    def hook(ct):
        box.total = box.total + ct
        return box.total

    return hook, lambda: box


def none_then_array():
    box = Box(total=None)

    def hook(ct):
        box.total = ct if box.total is None else box.total + ct

    return hook, lambda: box


def tuple_replaced():
    box = Box(pair=(0, jnp.zeros(3)))

    def hook(ct):
        box.pair = (box.pair[0] + 1, box.pair[1] + ct)
        return ct * box.pair[0]

    return hook, lambda: box


def deleted_attribute():
    box = Box(n=3, a=1.0)

    def hook(ct):
        if hasattr(box, "a"):
            del box.a
        else:
            box.a = 2.0
        box.n += 1

    return hook, lambda: box


def late_nonlocal():
    def hook(ct):
        nonlocal late
        try:
            late += 1
        except NameError:
            late = 1
        return ct * late

    if not callable(hook):
        late = 0
    return hook, lambda: late


def linked_list():
    class Node:
        def __init__(self, value):
            self.value, self.next = value, None

    box = Box(head=None, n=0)

    def hook(ct):
        box.n += 1
        node = Node(box.n)
        node.next = box.head
        box.head = node

    return hook, lambda: box


def exception_caught_half_way():
    box = Box(n=0, log=[])

    def fail():
        box.n += 1
        box.log.append(box.n)
        raise ValueError

    def hook(ct):
        try:
            fail()
        except ValueError:
            box.n += 10
        finally:
            box.log.append(-1)
        return ct * box.n

    return hook, lambda: box


def comprehensions():
    box = Box(n=0, items=[1, 2])

    def hook(ct):
        box.n = sum(i * box.n + 1 for i in box.items)
        box.items = [i + 1 for i in box.items]
        return ct * box.n

    return hook, lambda: box


PLACES = [
    attribute, partial_keyword, partial_position, bound_method, callable_object, class_attribute,
    instance_over_class_attribute, default_argument, keyword_default, nonlocal_variable, function_attribute, slots,
    private_slot, dataclass_field, frozen_dataclass_replaced, property_with_setter, own_setattr, super_methods,
    dict_items, list_items, list_append, list_added_to_another, list_extended_by_itself, chain_of_new_objects,
    deque_of_a_subclass, heap, set_items, deque_items, counter_dict, nested_containers, list_of_itself,
    jax_array, none_then_array, tuple_replaced, deleted_attribute, late_nonlocal, linked_list,
    exception_caught_half_way, comprehensions,
]  # fmt: skip


@cases(*PLACES)
def test_state_is_what_eager_makes_it(case):
    same_as_eager(case)


GLOBAL_COUNT = 0


def test_global():
    global GLOBAL_COUNT
    GLOBAL_COUNT = 0

    def hook(ct):
        global GLOBAL_COUNT
        GLOBAL_COUNT += 1
        return ct * GLOBAL_COUNT

    fn = jhop.jit(gradient(hook), fullgraph=True)
    assert [fn(X).tolist()[0] for _ in range(3)] == [2.0, 4.0, 6.0]
    assert GLOBAL_COUNT == 3


def test_global_that_the_hook_creates():
    globals().pop("NEW_GLOBAL", None)

    def hook(ct):
        global NEW_GLOBAL
        try:
            NEW_GLOBAL += 1
        except NameError:
            NEW_GLOBAL = 1

    fn = jhop.jit(gradient(hook), fullgraph=True)
    for _ in range(3):
        fn(X)
    assert globals().pop("NEW_GLOBAL") == 3


# Code that jhop must find to know what state it touches.


def constructor_counts():
    class Record:
        count = 0

        def __init__(self, ct):
            Record.count += 1
            self.ct = ct

    return (lambda ct: Record(ct).ct), lambda: Record.count


def new_counts():
    class Record:
        count = 0

        def __new__(cls, ct):
            Record.count += 1
            self = object.__new__(cls)
            self.ct = ct
            return self

    return (lambda ct: Record(ct).ct), lambda: Record.count


def context_manager_counts():
    box = Box(n=0)

    @contextlib.contextmanager
    def scope():
        box.n += 1
        yield

    def hook(ct):
        with scope():
            return ct * 2.0

    return hook, lambda: box


def method_caller():
    class Counter:
        def __init__(self):
            self.n = 0

        def bump(self):
            self.n += 1

    counter, bump = Counter(), operator.methodcaller("bump")

    def hook(ct):
        bump(counter)

    return hook, lambda: counter


def single_dispatch():
    box = Box(n=0)

    @functools.singledispatch
    def bump(value):
        box.n += 1

    def hook(ct):
        bump(1)

    return hook, lambda: box


def decorated():
    box = Box(n=0)

    def counted(fn):
        @functools.wraps(fn)
        def wrapper(*args, **kwargs):
            box.n += 1
            return fn(*args, **kwargs)

        return wrapper

    @counted
    @counted
    def hook(ct):
        return ct * box.n

    return hook, lambda: box


def transformed_by_jax():
    box = Box(n=0)

    def double(ct):
        box.n += 1
        return ct * 2.0

    helper = jax.vmap(double)
    return (lambda ct: helper(ct)), lambda: box


@cases(constructor_counts, new_counts, context_manager_counts, method_caller, single_dispatch, decorated)
def test_state_behind_other_code(case):
    same_as_eager_or_refused(case)


def test_state_behind_a_transformed_helper_is_lifted_or_refused():
    """A helper that JAX transformed when it was defined, outside the hook."""
    try:
        got = history(transformed_by_jax, True)
    except jhop.JhopError:
        return
    assert got == history(transformed_by_jax, False)


# Several hooks, and aliases.


@pytest.mark.parametrize("kind", ["two hooks of one value", "hooks of two values", "same hook twice"])
def test_hooks_share_an_object_in_the_order_of_eager(kind):
    def make():
        box = Box(n=1, log=[])

        def double(ct):
            box.n = box.n * 2
            box.log.append(box.n)
            return ct * box.n

        def add(ct):
            box.n = box.n + 3
            box.log.append(box.n)
            return ct + box.n

        def loss(x):
            if kind == "two hooks of one value":
                return (jhop.hook(jhop.hook(x, double), add) ** 2).sum()
            if kind == "same hook twice":
                return (jhop.hook(jhop.hook(x, double) ** 2, double) * 3).sum()
            return (jhop.hook(jhop.hook(x, double) ** 2, add) * 3).sum()

        return box, jax.grad(loss)

    eager_box, eager = make()
    jit_box, fn = make()
    compiled = jhop.jit(fn, fullgraph=True)
    for _ in range(3):
        np.testing.assert_allclose(compiled(X), eager(X), rtol=1e-6)
        assert vars(jit_box) == vars(eager_box)


def test_one_object_reached_by_two_ways():
    inner = Box(n=0)
    outer, table = Box(inner=inner), {"inner": inner}

    def hook(ct):
        outer.inner.n += 1
        table["inner"].n += 10
        return ct * inner.n

    fn = jhop.jit(gradient(hook), fullgraph=True)
    fn(X), fn(X)
    assert inner.n == 22 and outer.inner is inner and table["inner"] is inner


def test_objects_that_change_places():
    a, b = Box(v=1.0), Box(v=2.0)
    box = Box(first=a, second=b)

    def hook(ct):
        box.first, box.second = box.second, box.first
        box.first.v *= 2

    fn = jhop.jit(gradient(hook), fullgraph=True)
    fn(X), fn(X), fn(X)
    assert (a.v, b.v, box.first) == (2.0, 8.0, b)


def test_new_list_stored_twice_stays_one_list():
    box = Box(a=None, b=None)

    def hook(ct):
        box.a = box.b = [1]

    jhop.jit(gradient(hook), fullgraph=True)(X)
    assert box.a is box.b


def test_one_array_in_two_places_is_one_array_to_the_hook():
    array = jnp.ones(3)
    box = Box(a=array, b=array)
    fn = gradient(lambda ct: ct * (2.0 if box.a is box.b else 3.0))
    assert jhop.jit(fn, fullgraph=True)(X).tolist() == fn(X).tolist()


# Numbers.


@pytest.mark.parametrize("start", [0, 2**31 - 3, -(2**31) + 2, 2**40, 2**63 - 2, 10**40, -(2**70)])
def test_int_is_exact(start):
    box = Box(n=start)

    def hook(ct):
        box.n += 1

    fn = jhop.jit(gradient(hook), fullgraph=True)
    for _ in range(5):
        fn(X)
    assert (type(box.n), box.n) == (int, start + 5)


@pytest.mark.parametrize("start", [2**31 - 2, -(2**31) + 1, 2**40])
def test_large_int_in_arithmetic_with_a_cotangent(start):
    """Plain JAX refuses an int beyond int32 here; jhop takes it as a float."""
    box = Box(n=start)

    def hook(ct):
        box.n += 1
        return ct * box.n

    fn = jhop.jit(gradient(hook), fullgraph=True)
    for i in range(3):
        np.testing.assert_allclose(fn(X), 2.0 * X * np.float32(start + 1 + i), rtol=1e-6)


def test_int_array_and_int_that_outgrows_it_is_no_silent_float():
    box = Box(n=2**31 - 2, total=jnp.zeros((), jnp.int32))

    def hook(ct):
        box.n += 1
        box.total = box.total + box.n

    fn = jhop.jit(gradient(hook), fullgraph=True)
    with contextlib.suppress(OverflowError, jhop.JhopError, jax.dtypes.TypePromotionError):
        fn(X), fn(X)
    assert box.total.dtype == jnp.int32


def floats():
    box = Box(x=0.1)

    def hook(ct):
        box.x = box.x * 1.1 + 0.7
        return ct * (box.x * 0.3)

    return hook, lambda: box


def float_beyond_float32():
    box = Box(x=1e38)

    def hook(ct):
        box.x = box.x * 10
        return ct * (box.x * 1e-40)

    return hook, lambda: box


def infinity_and_nan():
    box = Box(x=math.inf, y=0.0)

    def hook(ct):
        box.y = box.x - box.x
        box.x = -box.x
        return ct * (3.0 if box.y != box.y else 2.0)

    return hook, lambda: box


def sign_of_zero():
    box = Box(x=0.0)

    def hook(ct):
        box.x = -box.x
        return ct * math.copysign(1.0, box.x)

    return hook, lambda: box


def flags():
    box = Box(n=0, flag=True)

    def hook(ct):
        box.n += box.flag
        box.flag = box.n > 2
        return ct * box.n

    return hook, lambda: box


def power_that_turns_into_a_float():
    box = Box(n=1, p=0)

    def hook(ct):
        box.p = 2**box.n
        box.n -= 1

    return hook, lambda: box


def power_whose_type_is_asked():
    box = Box(n=1)

    def hook(ct):
        power = 2**box.n
        box.n -= 1
        return ct * 10.0 if isinstance(power, float) else ct

    return hook, lambda: box


def root_that_turns_complex():
    box = Box(x=4.0, root=0.0)

    def hook(ct):
        box.root = abs(box.x**0.5)
        box.x -= 3.0

    return hook, lambda: box


def division_by_zero_caught_first():
    box = Box(n=0)

    def hook(ct):
        try:
            k = 10 // box.n
        except ZeroDivisionError:
            k = 1
        box.n += 1
        return ct * k

    return hook, lambda: box


def division_by_zero_caught_later():
    box = Box(n=2)

    def hook(ct):
        try:
            k = 10 // box.n
        except ZeroDivisionError:
            k = 1
        box.n -= 1
        return ct * k

    return hook, lambda: box


def overflow_caught():
    box = Box(x=1e200)

    def hook(ct):
        try:
            k = box.x**2
        except OverflowError:
            k = 1.0
        box.x = 2.0
        return ct * k

    return hook, lambda: box


def negative_shift_caught():
    box = Box(n=-1)

    def hook(ct):
        try:
            k = 1 << box.n
        except ValueError:
            k = 5
        box.n += 1
        return ct * k

    return hook, lambda: box


def type_asked():
    box = Box(n=0)

    def hook(ct):
        box.n += 1
        return ct * (2.0 if type(box.n) is int else 3.0)

    return hook, lambda: box


def type_as_key():
    box = Box(n=0)
    table = {int: 2.0, float: 3.0}
    return (lambda ct: ct * table.get(type(box.n), 7.0)), lambda: box


def functions_of_numbers():
    box = Box(n=1, x=0.5)

    def hook(ct):
        box.n += 1
        box.x += 0.5
        k = math.sqrt(box.x) + math.floor(box.x) + round(box.x, 1) + box.n.bit_length() + divmod(box.n, 2)[1]
        k += min(box.n, box.x) + sum([box.n, box.x]) + box.n**2 + 2**box.n + abs(-box.n) + (box.n << 1)
        return ct * (k + (~box.n) + (box.n & 1) + float(box.x) + int(box.x))

    return hook, lambda: box


def jax_functions_of_numbers():
    box = Box(n=1, x=0.5)

    def hook(ct):
        box.n += 1
        box.x = box.x + 0.25
        k = jnp.sin(box.x) * jnp.maximum(box.n, box.x) * jnp.asarray(box.x, jnp.float32) * jnp.float32(box.n)
        return jnp.power(ct, box.n) * k + ct**box.n

    return hook, lambda: box


@cases(floats, float_beyond_float32, infinity_and_nan, sign_of_zero, flags)
def test_number_is_what_eager_makes_it(case):
    same_as_eager(case)


@cases(power_that_turns_into_a_float, power_whose_type_is_asked, root_that_turns_complex)
def test_arithmetic_whose_type_hangs_on_values(case):
    same_as_eager_or_refused(case)


@cases(division_by_zero_caught_first, division_by_zero_caught_later, overflow_caught, negative_shift_caught)
def test_arithmetic_that_raises_for_some_values(case):
    same_as_eager_or_refused(case)


@cases(type_asked, type_as_key)
def test_type_of_a_number(case):
    same_as_eager_or_refused(case)


@cases(functions_of_numbers, jax_functions_of_numbers)
def test_functions_of_numbers(case):
    same_as_eager(case)


def test_long_chain_of_arithmetic_with_a_branch():
    box = Box(n=0)

    def hook(ct):
        for _ in range(600):
            box.n += 1
        return ct * (2.0 if box.n > 5 else 3.0)

    jhop.jit(gradient(hook), fullgraph=True)(X)
    assert box.n == 600


# NumPy.


def numpy_int_counter():
    box = Box(n=np.int64(0))

    def hook(ct):
        box.n = box.n + 1

    return hook, lambda: box


def numpy_int_beyond_int32():
    box = Box(n=np.int64(2**40))

    def hook(ct):
        box.n = box.n + 1

    return hook, lambda: box


def numpy_float_sum():
    box = Box(x=np.float64(0.1))

    def hook(ct):
        box.x = box.x + 0.1

    return hook, lambda: box


def numpy_array_sum():
    box = Box(a=np.array([0.1]))

    def hook(ct):
        box.a = box.a + 0.1

    return hook, lambda: box


def numpy_array_moved():
    box = Box(a=np.array([0.1]), old=None)

    def hook(ct):
        box.old = box.a

    return hook, lambda: (box, box.a is box.old)


def numpy_array_in_place():
    buffer = np.zeros(3, np.float32)
    box = Box(a=buffer)

    def hook(ct):
        box.a += np.ones(3, np.float32)

    return hook, lambda: (box, buffer)


def numpy_item_set():
    buffer = np.zeros(3, np.float32)

    def hook(ct):
        buffer[0] += 1

    return hook, lambda: buffer


def numpy_read_beyond_int32():
    box = Box(a=np.array([2**40]))
    return (lambda ct: ct * (box.a[0] > 5)), lambda: box


def numpy_array_made_by_the_hook():
    box = Box(a=None)

    def hook(ct):
        box.a = np.zeros(2)

    def between(i):
        box.a[0] = 7.0

    return hook, lambda: box, between


def masked_array():
    array = np.ma.array([1.0, 2.0], mask=[0, 1], dtype=np.float32)
    return (lambda ct: ct * array.sum()), lambda: array.tolist()


def durations():
    array = np.array([1, 2], "m8[s]")
    return (lambda ct: ct * float(array[1] / np.timedelta64(1, "s"))), lambda: array.tolist()


def structured_array():
    array = np.zeros(1, dtype=[("k", "f4")])
    return (lambda ct: ct * float(array["k"][0])), lambda: array.tolist()


@cases(
    numpy_int_counter, numpy_int_beyond_int32, numpy_float_sum, numpy_array_sum, numpy_array_moved,
    numpy_array_in_place, numpy_item_set, numpy_read_beyond_int32, numpy_array_made_by_the_hook, masked_array,
    structured_array, durations,
)  # fmt: skip
def test_numpy_state_is_as_in_eager_or_refused(case):
    try:
        got = history(case, True)
    except jhop.JhopError:
        return
    want = history(case, False)
    assert got == want


# Values that hooks store.

Pair = collections.namedtuple("Pair", "a b")


class SubList(list):
    pass


class SubDict(dict):
    pass


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Record:
    a: object
    b: object = None


STORED = {
    "number": lambda ct, n: n,
    "array": lambda ct, n: ct,
    "list": lambda ct, n: [n, ct],
    "tuple": lambda ct, n: (n, (ct, 1)),
    "dict": lambda ct, n: {"n": n, "ct": ct},
    "dict with a number as key": lambda ct, n: {n: 1},
    "set": lambda ct, n: {n},
    "frozenset": lambda ct, n: frozenset([n]),
    "deque": lambda ct, n: collections.deque([n, ct]),
    "deque with maxlen": lambda ct, n: collections.deque([n, ct], maxlen=2),
    "object": lambda ct, n: Record(n, ct),
    "object in a list": lambda ct, n: [Record(n), Record(ct)],
    "namespace": lambda ct, n: Box(n=n, ct=ct),
    "slice": lambda ct, n: slice(n),
    "string": lambda ct, n: f"{n}!",
    "enum": lambda ct, n: Colour.RED,
    "int enum": lambda ct, n: Level.LOW,
    "array of a number": lambda ct, n: jnp.asarray(n),
    "key": lambda ct, n: jax.random.key_data(jax.random.key(0)),
    # What follows needs more than a look at the type's name.
    "namedtuple": lambda ct, n: Pair(n, 1),
    "namedtuple of array": lambda ct, n: Pair(ct, 1),
    "OrderedDict": lambda ct, n: collections.OrderedDict(a=n),
    "defaultdict": lambda ct, n: collections.defaultdict(int, a=n),
    "Counter": lambda ct, n: collections.Counter(a=n),
    "subclass of list": lambda ct, n: SubList([n]),
    "subclass of dict": lambda ct, n: SubDict(a=n),
    "closure": lambda ct, n: lambda: n,
    "default": lambda ct, n: lambda k=n: k,
    "partial": lambda ct, n: functools.partial(max, n),
    "numpy array": lambda ct, n: np.array([n]),
    "generator": lambda ct, n: (i for i in [n]),
    "iterator": lambda ct, n: iter([n]),
    "exception": lambda ct, n: ValueError(n),
    "bound method": lambda ct, n: [n].append,
    "mapping proxy": lambda ct, n: types.MappingProxyType({"a": n}),
    "chain map": lambda ct, n: collections.ChainMap({"a": n}),
}


def no_symbol_in(value):
    """Fails if anything that a value reaches is a symbol or a tracer."""
    seen, work = set(), [value]
    while work:
        item = work.pop()
        if id(item) in seen or isinstance(item, (types.ModuleType, type)) or item is globals():
            continue
        seen.add(id(item))
        assert type(item).__name__ != "Scalar", f"a symbol was left behind: {item!r}"
        assert not isinstance(item, jax.core.Tracer), "a tracer was left behind"
        if type(item).__module__.split(".")[0] in ("jax", "jaxlib", "jhop") and not isinstance(item, (dict, list)):
            continue
        work += gc.get_referents(item)


@pytest.mark.parametrize("kind", STORED)
def test_stored_value_holds_no_symbol(kind):
    box = Box(n=0, value=None)

    def hook(ct):
        box.n += 1
        box.value = STORED[kind](ct, box.n)

    fn = jhop.jit(gradient(hook), fullgraph=True)
    with contextlib.suppress(jhop.Unsupported):
        fn(X), fn(X)
    no_symbol_in(box)


@pytest.mark.parametrize("kind", STORED)
def test_stored_value_is_that_of_eager_or_refused(kind):
    def case():
        box = Box(n=0, value=None)

        def hook(ct):
            box.n += 1
            box.value = STORED[kind](ct, box.n)

        return hook, lambda: box

    try:
        got = history(case, True, steps=3)
    except jhop.Unsupported:
        return
    assert got == history(case, False, steps=3)


FRESH = {
    "list": list,
    "object": lambda: Record(1),
    "empty object": object,
    "counter": collections.Counter,
    "ordered dict": collections.OrderedDict,
    "subclass of list": SubList,
    "deque": collections.deque,
    "set": set,
    "numpy array": lambda: np.zeros(2),
    "closure": lambda: lambda: 1,
}


@pytest.mark.parametrize("kind", FRESH)
def test_object_made_by_a_hook_is_another_one_each_time(kind):
    make, box = FRESH[kind], Box(value=None)

    def hook(ct):
        box.value = make()

    fn, made = jhop.jit(gradient(hook), fullgraph=True), []
    with contextlib.suppress(jhop.Unsupported):
        for _ in range(3):
            fn(X)
            made.append(box.value)
            box.value = None
    assert len(set(map(id, made))) == len(made)


def test_stored_enum_member_is_the_member():
    box = Box(value=None)

    def hook(ct):
        box.value = Colour.RED

    jhop.jit(gradient(hook), fullgraph=True)(X)
    assert box.value is Colour.RED


def test_new_object_that_holds_itself():
    box = Box(value=None)

    def hook(ct):
        value = [1]
        value.append(value)
        box.value = value

    fn = jhop.jit(gradient(hook), fullgraph=True)
    with contextlib.suppress(jhop.Unsupported):
        fn(X)
    assert box.value is None or box.value[1] is box.value


# Dicts.


def reordered():
    table = {"a": 1.0, "b": 2.0, "c": 3.0}

    def hook(ct):
        first = next(iter(table))
        table[first] = table.pop(first)
        return ct * table[first]

    return hook, lambda: table


def moved_to_end():
    table = collections.OrderedDict(a=1.0, b=2.0, c=3.0)

    def hook(ct):
        first = next(iter(table))
        table.move_to_end(first)
        return ct * table[first]

    return hook, lambda: table


def keys_exchanged():
    table = {"x": 1.0}

    def hook(ct):
        ((key, value),) = table.items()
        table.clear()
        table["y" if key == "x" else "x"] = value + 1.0

    return hook, lambda: table


def number_as_key():
    box = Box(n=0)
    table = {}

    def hook(ct):
        box.n += 1
        table[box.n % 3] = 1

    return hook, lambda: (box, table)


def memo():
    box, table = Box(n=0), {}

    def look_up(key):
        if key not in table:
            table[key] = key * 2.0
        return table[key]

    def hook(ct):
        box.n = (box.n + 1) % 3
        return ct * look_up(box.n)

    return hook, lambda: (box, table)


def default_dict():
    box, table = Box(n=0), collections.defaultdict(int)

    def hook(ct):
        box.n += 1
        table[box.n % 2] += 1
        return ct * table[0]

    return hook, lambda: (box, table)


@cases(reordered, moved_to_end, keys_exchanged, number_as_key, memo, default_dict)
def test_dict_is_what_eager_makes_it(case):
    same_as_eager(case, steps=5)


def setitem_that_counts():
    calls = []

    class Logged(dict):
        def __setitem__(self, key, value):
            calls.append(key)
            dict.__setitem__(self, key, value)

    table = Logged(n=0)

    def hook(ct):
        table["n"] = table["n"] + 1

    return hook, lambda: (table, calls)


def setitem_that_doubles():
    class Doubling(list):
        def __setitem__(self, index, value):
            list.__setitem__(self, index, value * 2)

    items = Doubling([1.0, 2.0])
    return (lambda ct: ct * items[0]), lambda: items


def setitem_that_raises():
    class ReadOnly(dict):
        def __setitem__(self, key, value):
            raise TypeError("read only")

    table = ReadOnly(k=2.0)
    return (lambda ct: ct * table["k"]), lambda: table


def getitem_that_scales():
    class Scaled(dict):
        def __getitem__(self, key):
            return dict.__getitem__(self, key) * 10

    table = Scaled(k=2.0)
    return (lambda ct: ct * table["k"]), lambda: table


def items_that_lies():
    class Lying(dict):
        def items(self):
            return []

    table = Lying(n=0)

    def hook(ct):
        table["n"] += 1

    return hook, lambda: table["n"]


@cases(setitem_that_counts, setitem_that_doubles, setitem_that_raises, getitem_that_scales, items_that_lies)
def test_container_with_methods_of_its_own(case):
    same_as_eager_or_refused(case)


def test_guard_of_a_defaultdict_adds_no_key():
    table = collections.defaultdict(list, a=[1.0], b=[2.0])
    fn = jhop.jit(gradient(lambda ct: ct * table["b"][0]), fullgraph=True)
    fn(X)
    del table["a"]
    fn(X)
    assert list(table) == ["b"]


# Cost: a change of a value is no change of the graph.


def entries(fn):
    return fn.versions()


def traces(change):
    """How often a hook is traced in six calls between which `change(box, i)` runs."""
    box, seen = Box(n=0, x=0.5, a=jnp.zeros(3), b=np.zeros(3, np.float32), items=[1.0, 2.0], table={"k": 1}), []

    def hook(ct):
        box.n += 1
        box.x = box.x * 1.5
        box.a = box.a + ct
        box.items[0] += 1
        box.table["k"] += 1
        return ct * box.n + box.x + box.a + box.b

    fn = jhop.jit(gradient(hook), fullgraph=True)
    for i in range(6):
        fn(X)
        change(box, i)
    seen.append(entries(fn))
    return seen[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda box, i: None,
        lambda box, i: setattr(box, "n", -i),
        lambda box, i: setattr(box, "x", i * 0.1),
        lambda box, i: setattr(box, "a", jnp.full(3, i, jnp.float32)),
        lambda box, i: setattr(box, "b", np.full(3, i, np.float32)),
        lambda box, i: box.b.fill(i),
        lambda box, i: box.items.__setitem__(1, float(i)),
        lambda box, i: box.table.update(k=i),
    ],
    ids=["nothing", "int", "float", "array", "numpy array", "numpy array in place", "list item", "dict item"],
)
def test_changed_values_cost_no_new_trace(change):
    assert traces(change) == 1


def test_alternating_branches_cost_one_trace_each():
    box = Box(n=0)

    def hook(ct):
        box.n += 1
        return ct * (2.0 if box.n % 2 else 3.0)

    fn = jhop.jit(gradient(hook), fullgraph=True)
    assert [fn(X).tolist()[0] for _ in range(6)] == [4.0, 6.0] * 3
    assert entries(fn) == 2


@pytest.mark.parametrize("kind", ["append", "named tuple", "tuple", "object"])
def test_state_that_is_replaced_at_each_call_costs_few_traces(kind):
    box = Box(log=[], state=(0, 1.0), record=Record(0))

    def hook(ct):
        if kind == "append":
            box.log.append(ct)
        elif kind == "object":
            box.record = Record(box.record.a + 1)
        else:
            box.state = (box.state[0] + 1, box.state[1])

    fn = jhop.jit(gradient(hook), fullgraph=True)
    for _ in range(8):
        fn(X)
    assert entries(fn) <= 3


def test_list_of_ten_thousand():
    items, box = list(range(10_000)), Box(i=0)

    def hook(ct):
        box.i += 1
        items[box.i] += 5
        return ct * items[box.i]

    fn = jhop.jit(gradient(hook), fullgraph=True)
    assert [fn(X).tolist()[0] for _ in range(3)] == [12.0, 14.0, 16.0]
    assert items[:5] == [0, 6, 7, 8, 4]


# Errors leave everything as it was.


def failing_hook(box):
    def hook(ct):
        box.n += 1
        box.items.append(ct)
        box.table["new"] = 1
        del box.gone
        raise ValueError("no")

    return hook


def wrong_shape(box):
    def hook(ct):
        box.n += 1
        box.items.append(ct)
        return ct[:1]

    return hook


def branch_on_value(box):
    def hook(ct):
        box.n += 1
        box.items.append(ct)
        return ct if ct.sum() > 0 else -ct

    return hook


def write_in_scan(box):
    def hook(ct):
        def body(carry, _):
            box.n += 1
            return carry, None

        return jax.lax.scan(body, ct, None, length=2)[0]

    return hook


def hidden_in_a_lock(box):
    def hook(ct):
        box.n += 1
        box.hidden = (i for i in [ct])

    return hook


@pytest.mark.parametrize("make", [failing_hook, wrong_shape, branch_on_value, write_in_scan, hidden_in_a_lock])
def test_failed_trace_leaves_everything(make):
    box = Box(n=1, items=[1.0], table={"k": 2.0}, gone=1)
    before = frozen(box)
    fn = jhop.jit(gradient(make(box)), fullgraph=True)
    for _ in range(2):
        with pytest.raises(jhop.JhopError):
            fn(X)
        assert frozen(box) == before


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_failed_backend_leaves_everything(when):
    box = Box(n=1)

    def hook(ct):
        box.n += 1

    def backend(gm, example_inputs):
        if when == "compiling":
            raise ValueError("no")

        def run(*args):
            raise ValueError("no")

        return run

    compiled = jhop.compile(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook))(X), backend=backend)
    with pytest.raises(ValueError, match="no"):
        compiled(X)
    assert box.n == 1


def test_host_arithmetic_that_fails_at_a_later_run_leaves_everything():
    box = Box(n=2, k=0, first=0)

    def hook(ct):
        box.first += 1
        box.k = 10 // box.n
        box.n -= 1

    fn = jhop.jit(gradient(hook), fullgraph=True)
    fn(X), fn(X)
    before = frozen(box)
    with pytest.raises((ZeroDivisionError, jhop.Unsupported)):
        fn(X)
    assert frozen(box) == before


@pytest.mark.parametrize("where", ["property", "frozen dataclass", "dict subclass"])
def test_refused_write_leaves_everything(where):
    class Strict:
        _n = 0

        @property
        def n(self):
            return self._n

        @n.setter
        def n(self, value):
            raise ValueError("refused")

    @dataclasses.dataclass(frozen=True)
    class Frozen:
        n: int = 0

    class ReadOnly(dict):
        def __setitem__(self, key, value):
            raise ValueError("refused")

    box = Box(first=0)
    target = {"property": Strict(), "frozen dataclass": Frozen(), "dict subclass": ReadOnly(n=0)}[where]

    def hook(ct):
        box.first += 1
        if where == "dict subclass":
            target["n"] = target["n"] + 1
        else:
            target.n = target.n + 1

    fn = jhop.jit(gradient(hook), fullgraph=True)
    with pytest.raises((jhop.JhopError, ValueError, dataclasses.FrozenInstanceError)):
        fn(X)
    fresh = ReadOnly(n=0) if where == "dict subclass" else type(target)()
    assert box.first == 0 and frozen(target) == frozen(fresh)


# What cannot be traced.

UNTRACEABLE = {
    "float": lambda ct: ct * float(ct[0]),
    "int": lambda ct: ct * int(ct[0]),
    "item": lambda ct: ct * ct[0].item(),
    "tolist": lambda ct: ct * ct.tolist()[0],
    "if": lambda ct: ct * 2.0 if ct.sum() > 0 else ct,
    "and": lambda ct: ct * (2.0 if ct.sum() > 0 and True else 1.0),
    "asarray": lambda ct: jnp.asarray(np.asarray(ct) * 2),
    "numpy ufunc": lambda ct: jnp.asarray(np.sin(np.array(ct))),
    "range": lambda ct: ct * len(range(int(ct.sum()))),
    "index": lambda ct: ct * [1.0, 2.0, 3.0][int(ct[0]) % 3],
    "boolean mask": lambda ct: ct * ct[ct > 0].sum(),
    "str": lambda ct: ct * (2.0 if f"{float(ct[0])}" else 1.0),
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_untraceable_hook_is_refused(kind):
    with pytest.raises(jhop.Unsupported):
        jhop.jit(gradient(UNTRACEABLE[kind]), fullgraph=True)(X)


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_untraceable_hook_runs_on_the_host_with_one_warning(kind):
    box = Box(n=0)

    def hook(ct):
        box.n += 1
        return UNTRACEABLE[kind](ct)

    fn = jhop.jit(gradient(hook))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [fn(X).tolist() for _ in range(3)]
    assert (len(caught), box.n) == (1, 3)
    np.testing.assert_allclose(got, [gradient(hook)(X).tolist()] * 3, rtol=1e-6)


def iterator():
    numbers = iter([1.0, 2.0, 3.0])
    return lambda ct: ct * next(numbers)


def count_iterator():
    numbers = itertools.count(1)
    return lambda ct: ct * next(numbers)


def running_generator():
    numbers = (float(i + 1) for i in range(9))
    return lambda ct: ct * next(numbers)


def cached_helper():
    @functools.lru_cache
    def helper(k):
        return k * 2.0

    return lambda ct: ct * helper(3)


def byte_array():
    data = bytearray(b"\x02")

    def hook(ct):
        data[0] += 1
        return ct * data[0]

    return hook


HOST_ONLY = [iterator, count_iterator, running_generator, cached_helper, byte_array]


@pytest.mark.parametrize("make", HOST_ONLY)
def test_state_that_cannot_be_lifted_is_refused(make):
    with pytest.raises(jhop.Unsupported):
        jhop.jit(gradient(make()), fullgraph=True)(X)


@pytest.mark.parametrize("make", HOST_ONLY)
def test_state_that_cannot_be_lifted_works_eagerly(make):
    fn = gradient(make())
    assert fn(X).shape == fn(X).shape == X.shape


@pytest.mark.parametrize("make", HOST_ONLY)
def test_state_that_cannot_be_lifted_works_on_the_host(make):
    fn, eager = jhop.jit(gradient(make())), gradient(make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [fn(X).tolist() for _ in range(3)]
    assert len(caught) == 1
    assert got == [eager(X).tolist() for _ in range(3)]


# Leaks.


def tracers_alive():
    gc.collect()
    # isinstance would ask a weakref.proxy for its referent's class, and raise where that is gone.
    return [item for item in gc.get_objects() if issubclass(type(item), jax.core.Tracer)]


LEAK_CASES = [attribute, dict_items, list_append, jax_array, linked_list, floats, jax_functions_of_numbers, memo]


@pytest.mark.leaks
@cases(*LEAK_CASES)
def test_no_tracer_is_alive_afterwards(case):
    before = len(tracers_alive())
    hook, _ = case()
    fn = jhop.jit(gradient(hook), fullgraph=True)
    fn(X), fn(X)
    assert len(tracers_alive()) <= before


@pytest.mark.leaks
@pytest.mark.parametrize("make", [failing_hook, wrong_shape, branch_on_value])
def test_no_tracer_is_alive_after_an_error(make):
    before = len(tracers_alive())
    fn = jhop.jit(gradient(make(Box(n=1, items=[], table={}, gone=1))), fullgraph=True)
    try:
        fn(X)
    except jhop.JhopError as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
    assert len(tracers_alive()) <= before


@pytest.mark.leaks
@pytest.mark.parametrize("make", [failing_hook, branch_on_value])
def test_no_tracer_is_alive_after_a_hook_was_left_to_the_host(make):
    before = len(tracers_alive())
    fn = jhop.jit(gradient(make(Box(n=1, items=[], table={}, gone=1))), fullgraph=False)
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        fn(X)
    assert len(tracers_alive()) <= before


def test_jitted_helper_that_reads_state_can_be_used_afterwards():
    """`jax.jit` keeps what it traced: a helper of the hook must not be traced with a symbol in its closure."""
    box = Box(k=2.0)

    @jax.jit
    def helper(ct):
        return ct * box.k

    with contextlib.suppress(jhop.Unsupported):
        jhop.jit(gradient(lambda ct: helper(ct) * box.k), fullgraph=True)(X)
    assert helper(jnp.ones(3)).tolist() == [2.0] * 3


def test_jitted_helper_that_writes_state_leaves_no_tracer():
    box = Box(n=0)

    @jax.jit
    def helper(ct):
        box.n += 1
        return ct * 2.0

    def hook(ct):
        return helper(ct) * (box.n >= 0)

    with contextlib.suppress(jhop.Unsupported):
        jhop.jit(gradient(hook), fullgraph=True)(X)
    assert type(box.n) is int
    assert helper(jnp.ones(3)).tolist() == [2.0] * 3


def test_callback_of_the_garbage_collector_is_not_blamed_on_the_hook():
    """Hypothesis installs one that reads the clock; it runs wherever memory is allocated."""

    def callback(phase, info):
        time.perf_counter()

    def hook(ct):
        kept = [[] for _ in range(100_000)]
        return ct * float(len(kept) > 0)

    gc.callbacks.append(callback)
    try:
        assert jhop.jit(gradient(hook), fullgraph=True)(X).tolist() == (2.0 * X).tolist()
    finally:
        gc.callbacks.remove(callback)
