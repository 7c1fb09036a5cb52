"""Random programs on Tensors, as source text that runs on PyTorch and on jhop.

A program makes leaves, computes from them in `forward`, hooks what it can at random moments, and runs one to three
backward passes. It calls nothing of a framework by name: `ops` (elementwise functions, reductions), `leaf`, `const`,
`index`, `halves`, `no_grad`, `grad`, `kept`, `compiled` and `captured` stand in the scope that it is run in. Left out
is what jhop does otherwise than PyTorch on purpose; each such place says so.
"""

import dataclasses
import random

HEAD = """
LOG = []  # number of each hook that ran, and where passes began
COUNTS = {}
LAST = {}  # the gradient that each hook saw last
GRADS = []  # what passes returned
HANDLES = {}


def remove(k):
    if k in HANDLES:  # in the first round, not all were registered
        HANDLES[k].remove()


"""

# What a hook does with its gradient: source of the body, {k} its number, {v} a value of the gradient's shape.
LINEAR = ["return g * 1.5", "return -g", "return g * 0.5 + 0.25", "g = g * 2.0"]
NONLINEAR = ["return g * g + 0.5", "return g.clip(-0.6, 0.8)", "return ops.sin(g)", "return g * g.sum() * 0.1"]
SILENT = ["return None", "pass"]
STATEFUL = ["COUNTS[{k}] += 1\n    return g * COUNTS[{k}]", "COUNTS[{k}] += 1"]
POST = ["p.grad = p.grad * 0.5", "COUNTS[{k}] += 1", "p.grad = p.grad + COUNTS[{k}]\n    COUNTS[{k}] += 2"]
PRE_NODE = ["return tuple(None if g is None else g * 1.5 for g in outs)", "return None", "return (ops.sin(outs[0]),)"]
POST_NODE = ["return tuple(None if g is None else g * 0.5 for g in ins)", "return None"]


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the program: `moves` says whether it requires grad, `below` what it was computed from, itself too."""

    name: str
    shape: tuple[int, ...]
    moves: bool
    leaf: bool = False
    below: frozenset[str] = frozenset()
    small: bool = False  # between -1 and 1
    paired: bool = False  # one of two results of an operation


def matmul_shape(a, b):
    if not a or not b or a[-1] != b[0]:
        return None
    return (*a[:-1], *b[1:])


def broadcast(a, b):
    if a == b or not b or a[len(a) - len(b) :] == b:
        return a
    return None


class Program:
    """A random program.

    Args:
        seed: what it is made from.
        compiled: whether `forward` is compiled: what is in it can then be reached by what it returns alone.
        captured: whether passes are captured, which takes no hooks on nodes and no hook that frees a gradient.
        twice: whether passes are differentiated again.

    Attributes:
        source: its text.
        where: per hook, the name of its Tensor, or None for a node's.
        below: per name of a Tensor, those that it was computed from.
    """

    def __init__(self, seed, *, compiled=False, captured=False, twice=False):
        self._rng = random.Random(f"{seed} {compiled} {captured} {twice}")
        self._compiled, self._captured, self._twice = compiled, captured, twice
        self.twice = twice
        self._eager = not (compiled or captured or twice)
        self._hooks = []  # source of their definitions
        self._handles = []  # numbers of hooks that code outside of `forward` may remove
        self._local_handles = []
        self._tensor_hooks = []
        self._values = []
        self._closed_over = frozenset()  # what values that hooks close over were computed from
        self.several_nodes = False  # whether PyTorch makes several nodes of an operation of which jhop makes one
        self.where = {}
        rng = self._rng
        forward = self._forward(rng.randint(3, 12))
        main = self._main()
        text = [HEAD, *self._hooks, "def forward({}):".format(", ".join(v.name for v in self._leaves))]
        text += [f"    {line}" for line in self._late + forward]
        text += ["", "def main():", *(f"    {line}" for line in main)]
        self.source = "\n".join(text) + "\n"
        self.below = {value.name: value.below for value in self._values}

    # -- computing -----------------------------------------------------------------------------------------------------

    def _forward(self, n):
        rng = self._rng
        shapes = [(3,), (2, 3), (3,), (2, 2), (3, 2), ()]
        self._leaves = []
        for i in range(rng.randint(1, 3)):
            name = f"x{i}"
            moves = i == 0 or rng.random() < 0.85
            self._leaves.append(Value(name, rng.choice(shapes), moves, leaf=True, below=frozenset([name])))
        self._values += self._leaves
        self._late = []  # lines at the start of `forward`: they may register hooks on its inputs
        lines = []
        for value in self._leaves:
            if rng.random() < 0.15:
                self._hook_inside(self._late, value)
        while n > 0:
            block = rng.random() < 0.06
            if block:
                lines.append("with no_grad():")
            n -= 1
            made = self._step(recording=not block)
            lines += [f"    {line}" if block else line for line in made[0]]
            self._values += made[1]
            for value in made[1]:
                if rng.random() < 0.3:
                    self._hook_inside(lines, value)
            if rng.random() < 0.15:
                self._hook_inside(lines, rng.choice(self._values))
            if self._local_handles and rng.random() < 0.2:
                number = self._local_handles.pop(rng.randrange(len(self._local_handles)))
                lines.append(f"h{number}.remove()")
        # A last step that moves, so that there is something to differentiate.
        last = next(v for v in reversed(self._values) if v.moves)
        end = Value("end", last.shape, True, below=last.below | {"end"})
        lines.append(f"end = {last.name} * {self._leaf_of(last)}")
        self._values.append(end)
        self._outs = self._returned(end)
        lines.append(f"return {', '.join(v.name for v in self._outs)},")
        return lines

    def _leaf_of(self, value):
        fits = [v.name for v in self._leaves if v.moves and broadcast(value.shape, v.shape) is not None]
        return self._rng.choice(fits) if fits else "0.75"

    def _returned(self, end):
        """What `forward` returns.

        All that moves; compiled, values without hooks none of which was computed from another, nor, where passes are
        differentiated, what a hook closes over: as in torch.compile, a hook outside sees what comes from outside, and
        hooks inside run after it.
        """
        made = [v for v in self._values if v.moves and not v.leaf]
        if not self._compiled:
            return made
        outs = [end]
        for value in self._rng.sample(made, min(2, len(made))):
            apart = all(value.name not in out.below and out.name not in value.below for out in outs)
            apart = apart and not (self._twice and value.name in self._closed_over)
            if apart and not value.paired and value.name not in self.where.values():
                outs.append(value)
        return outs

    def _step(self, recording):
        """Lines of one operation, and the values that it makes."""
        rng = self._rng
        name = f"v{len(self._values)}"
        while True:
            a = rng.choice(self._values[-4:] if rng.random() < 0.6 else self._values)
            kind = rng.choice(["unary", "unary", "binary", "binary", "binary", "matmul", "reduce", "shape", "index"])
            if kind == "unary" and rng.random() < 0.12 and not self._compiled:
                kind = "pair"
            found = getattr(self, f"_{kind}")(a)
            if found is None:
                continue
            code, shape, used, *small = found
            below = frozenset().union(*(v.below for v in used))
            moves = recording and any(v.moves for v in used)
            if kind == "pair":
                parts = [f"{name}a", f"{name}b"]
                pair = [Value(part, shape, moves, below=below | {part}, paired=True) for part in parts]
                both = Value(name, shape, moves, below=below | {*parts, name})
                return [f"{parts[0]}, {parts[1]} = {code}", f"{name} = {parts[0]} * {parts[1]}"], [*pair, both]
            if code.endswith(".detach()"):
                moves = False
            if not moves:  # no gradient goes there, and orders nothing
                below = frozenset()
            return [f"{name} = {code}"], [Value(name, shape, moves, below=below | {name}, small=bool(small))]

    def _unary(self, a):
        code, *small = self._rng.choice([
            ("ops.sin({})", 1), ("ops.cos({})", 1), ("{} * 0.5",), ("0.7 - {}",), ("-{}",), ("{} + 1.0",), ("{} * {}",),
            ("{}.detach()",), *([] if self._twice else [
                ("ops.tanh({})", 1), ("ops.clip({}, -0.5, 0.9)", 1), ("abs({} - 0.037)",), ("ops.exp({})",),
                ("{} ** 2",), ("1.0 / (ops.exp({}))",), ("ops.where({} > 0.1, {}, 0.3 * {})",),
            ]),
        ])  # fmt: skip
        if "exp" in code and not a.small:
            return None
        if len(a.below) > 6 and "* {}" in code and not a.small:
            return None  # numbers grow by squaring
        return code.replace("{}", a.name), a.shape, [a], *small

    def _binary(self, a):
        b = self._rng.choice(self._values)
        shape = broadcast(a.shape, b.shape)
        if shape is None:
            return None
        pairs = ["{a} + {b}", "{a} - {b}", "{a} * {b}", "{b} * {a}"]
        if not self._twice:
            pairs += ["ops.maximum({a}, {b})", "ops.where(flags({a}), {a}, {b})"]
        return self._rng.choice(pairs).format(a=a.name, b=b.name), shape, [a, b]

    def _matmul(self, a):
        fits = [(b, matmul_shape(a.shape, b.shape)) for b in self._values]
        fits = [(b, shape) for b, shape in fits if shape is not None]
        if not fits:
            return None
        b, shape = self._rng.choice(fits)
        self.several_nodes |= len(a.shape) == 1 and len(b.shape) == 2  # the matrix is transposed first
        return f"{a.name} @ {b.name}", shape, [a, b]

    def _reduce(self, a):
        if not a.shape:
            return None
        axis = self._rng.choice([None, *range(len(a.shape))])
        names = ["sum", "mean"] if self._twice else ["sum", "mean", "amax"]
        given = "" if axis is None else f", axis={axis}"
        shape = () if axis is None else a.shape[:axis] + a.shape[axis + 1 :]
        return f"ops.{self._rng.choice(names)}({a.name}{given})", shape, [a]

    def _shape(self, a):
        rng = self._rng
        size = 1
        for length in a.shape:
            size *= length
        choices = [("ops.reshape({}, (-1,))", (size,)), ("ops.reshape({}, (1, -1))", (1, size))]
        if len(a.shape) == 2:
            choices.append(("{}.T", a.shape[::-1]))
        if size == 6:
            choices += [("ops.reshape({}, (2, 3))", (2, 3)), ("ops.reshape({}, (3, 2))", (3, 2))]
        if len(a.shape) == 1:
            others = [v for v in self._values if v.shape == a.shape]
            b = rng.choice(others)
            if rng.random() < 0.5:
                return f"ops.stack([{a.name}, {b.name}])", (2, *a.shape), [a, b]
            if a.shape[0] < 4:
                return f"ops.concatenate([{a.name}, {b.name}])", (2 * a.shape[0],), [a, b]
        code, shape = rng.choice(choices)
        return code.format(a.name), shape, [a]

    def _index(self, a):
        if not a.shape or a.shape[0] == 1:
            return None
        n, *rest = a.shape
        choices = [("[0]", rest), ("[-1]", rest), ("[1:]", [n - 1, *rest]), ("[index([1, 0, 1])]", [3, *rest])]
        if len(a.shape) == 2:
            choices += [("[:, 0]", [n]), ("[index([1, 0]), index([0, 0])]", [2])]
        code, shape = self._rng.choice(choices)
        return a.name + code, tuple(shape), [a]

    def _pair(self, a):
        if not a.shape or a.shape[0] % 2:
            return None
        self.several_nodes = True
        return f"halves({a.name})", (a.shape[0] // 2, *a.shape[1:]), [a]

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _new_hook(self, value, bodies=None, parameter="g", twin=True):
        """Number of a hook, which is defined now; or that of one which the Tensor has already."""
        rng = self._rng
        own = [k for k in self._tensor_hooks if self.where[k] == value.name]
        if bodies is None and twin and own and rng.random() < 0.15:
            return rng.choice(own)
        number = len(self.where)
        if bodies is None:
            kinds = [LINEAR, LINEAR, NONLINEAR, NONLINEAR, SILENT] + ([] if self._twice else [STATEFUL])
            bodies = rng.choice(kinds)
        body = rng.choice(bodies).format(k=number)
        if self._twice and "clip" in body:
            body = "return g * 0.25"
        note = ""
        if not self._twice and parameter == "g":
            note = f"    LAST[{number}] = kept(g)\n"
        if self._eager and rng.random() < 0.12 and self._handles:
            note += f"    remove({rng.choice(self._handles)})\n"
        self._hooks.append(
            f"COUNTS[{number}] = 1\n\n\ndef hook{number}({parameter}):\n    LOG.append({number})\n{note}    {body}\n"
        )
        self.where[number] = value.name if parameter in "gp" else None
        self._tensor_hooks += [number] if parameter == "g" else []
        return number

    def _hook_inside(self, lines, value):
        """Registers a hook in `forward`, as a named function or one that closes over a value computed there."""
        rng = self._rng
        if not value.moves:
            return
        # A leaf's hook goes on to the next run of `forward`, where the graph of what it closes over may be freed. For
        # PyTorch that is an error only where an operation saved something.
        if rng.random() < 0.25 and not (self._twice and value.leaf):
            fits = [v for v in self._values if broadcast(value.shape, v.shape) is not None and not v.leaf]
            if fits:
                number = len(self.where)
                self.where[number] = value.name
                other = rng.choice(fits)
                self._closed_over |= other.below
                body = f"LOG.append({number})\n        return g * {other.name} + 0.5"
                lines.append(f"def inner{number}(g):\n        {body}")
                lines.append(f"{value.name}.register_hook(inner{number})")
                return
        taken = value.name in {self.where[k] for k in self._local_handles}
        number = self._new_hook(value, twin=not taken)
        line = f"{value.name}.register_hook(hook{number})"
        if value.leaf or rng.random() < 0.5 or number in self._local_handles:
            lines.append(line)
        elif self._compiled or rng.random() < 0.5:
            self._local_handles.append(number)
            lines.append(f"h{number} = {line}")
        else:
            self._handles.append(number)
            lines.append(f"HANDLES[{number}] = {line}")

    def _between(self):
        """Things that happen outside of `forward`: registration, removal, `retain_grad`."""
        rng = self._rng
        lines = []
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            reach = [v for v in [*self._leaves, *self._out_values] if v.moves]
            value = rng.choice(reach)
            what = rng.choice(["hook", "hook", "hook", "retain", "post", "remove", "remove", "node", "clear"])
            if what == "hook":
                number = self._new_hook(value)
                lines.append(self._kept(number, f"{value.name}.register_hook(hook{number})"))
            elif what == "retain":
                lines.append(f"{value.name}.retain_grad()")
            elif what == "post" and value.leaf and not self._twice:
                bodies = [*POST, "p.grad = None"] if self._eager else POST
                number = self._new_hook(value, bodies, "p")
                line = f"{value.name}.register_post_accumulate_grad_hook(hook{number})"
                lines.append(self._kept(number, line))
            elif what == "remove" and self._handles:
                lines.append(f"remove({rng.choice(self._handles)})")
            elif what == "node" and not (value.leaf or value.paired) and self._eager:
                before = rng.random() < 0.5
                bodies, given = (PRE_NODE, "outs") if before else (POST_NODE, "ins, outs")
                number = self._new_hook(value, bodies, given)
                name = "register_prehook" if before else "register_hook"
                lines.append(self._kept(number, f"{value.name}.grad_fn.{name}(hook{number})"))
            elif what == "clear" and value.leaf:
                lines.append(f"{value.name}.grad = None")
        return lines

    def _kept(self, number, line):
        if number not in self._handles and self._rng.random() < 0.5:
            self._handles.append(number)
            return f"HANDLES[{number}] = {line}"
        return line

    # -- passes --------------------------------------------------------------------------------------------------------

    def _main(self):
        rng = self._rng
        self._out_values = []
        lines = [f"{v.name} = leaf({v.shape}, {i}, {v.moves})" for i, v in enumerate(self._leaves)]
        lines += self._between()
        lines.append("run = compiled(forward)")
        for _ in range(rng.choice([1, 1, 2])):
            names = [v.name for v in self._outs]
            lines.append(f"{', '.join(names)}, = run({', '.join(v.name for v in self._leaves)})")
            self._out_values = self._outs
            lines += self._between()
            n = rng.choice([1, 1, 2])
            lines += self._root()
            for i in range(n):
                lines.append("LOG.append('pass')")
                lines += self._pass(keep=i + 1 < n)
                lines += self._between() if i + 1 < n else []
        lines.append(f"return [{', '.join(v.name for v in [*self._leaves, *self._outs])},]")
        return lines

    def _root(self):
        """The Tensor where passes start: one of the results, or a sum over several."""
        rng = self._rng
        self._end = self._outs[-1] if not self._compiled else self._outs[0]
        others = [v for v in self._outs if v is not self._end and not v.paired]
        others = rng.sample(others, min(rng.choice([0, 1, 1, 2]), len(others)))
        self._seed = ""
        if not others and not self._twice and rng.random() < 0.4:
            self._seed = f"const({self._end.shape})"
            return [f"root = {self._end.name} * 1.0"]
        terms = [f"({v.name} * {rng.choice([0.5, 1.0, 3.0])}).sum()" for v in [self._end, *others]]
        return [f"root = {' + '.join(terms)}"]

    def _pass(self, keep):
        """Lines of one backward pass: of `backward`, of it to some inputs, or of `grad`."""
        rng = self._rng
        leaves = [v.name for v in self._leaves if v.moves]
        options = ["retain_graph=True"] if keep else []
        if self._twice:
            name = rng.choice(leaves)
            return [
                f"g = grad(root, [{name}], create_graph=True, allow_unused=True)[0]",
                "GRADS.append(g)",
                f"root2 = (g * {name} * {name}).sum() if g is not None else {name}.sum()",
                "LOG.append('pass')",
                "with captured():",
                f"    root2.backward({', '.join(options)})",
            ]
        # At an input, jhop gives the gradient after its hooks, also where one above it is asked for: ask for one. Where
        # an operation has two results, PyTorch has two nodes, of which it may need but one.
        one = [rng.choice([v.name for v in self._out_values if v.moves and not v.paired])]
        kind = rng.choice(["backward", "backward", "inputs", "grad"])
        lines = ["with captured():"]
        if kind == "grad":
            by = rng.choice([leaves, one, [rng.choice(leaves)]])
            given = [f"[{', '.join(by)}]", *([self._seed] if self._seed else []), "allow_unused=True", *options]
            lines.append(f"    GRADS.extend(grad(root, {', '.join(given)}))")
        else:
            given = [*([self._seed] if self._seed else []), *options]
            if kind == "inputs":
                by = rng.choice([leaves, one, [rng.choice(leaves)], [*leaves, *one]])
                given.append(f"inputs=[{', '.join(by)}]")
            lines.append(f"    root.backward({', '.join(given)})")
        if rng.random() < 0.2:
            value = rng.choice([v for v in [*self._leaves, *self._out_values] if v.moves])
            number = self._new_hook(value)
            lines = [f"with {value.name}.register_hook(hook{number}):", *(f"    {line}" for line in lines)]
        return lines
