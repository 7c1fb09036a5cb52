"""Makes `programs.json`, the part of the corpus of hook programs that the tests need.

    python tests/corpus/extract.py FOLDER

FOLDER holds `public.json` (what PyTorch did with each program) and `required.json` (what jhop must do alike). Taken are
all programs whose graph text or values are required, and all that must raise. Equal texts and equal results are stored
once.
"""

import json
import sys
from pathlib import Path

HOW = (
    "name", "program_source", "inputs", "mode", "backends", "hooks_outside", "post_acc_hooks_outside", "grad_out",
    "backward_times", "retain_graph", "second_call", "enable_around_forward", "dynamic", "state_after_exprs",
)  # fmt: skip
# What a program says of PyTorch's own methods, in words that arrays know.
ADAPTED = {
    "g.double()": 'g.astype("float64")',
    "g.numpy()": '__import__("numpy").asarray(g)',
    "g.sin().exp()": "ops.exp(ops.sin(g))",
}
TARGET = Path(__file__).with_name("programs.json")


class Table:
    """Values stored once each, known by their index."""

    def __init__(self):
        self.rows = []
        self._index = {}

    def add(self, value):
        key = json.dumps(value, sort_keys=True)
        if key not in self._index:
            self._index[key] = len(self.rows)
            self.rows.append(value)
        return self._index[key]


def simple(value):
    """A recorded value: tensors as [dtype, shape, values], everything else as it is."""
    if isinstance(value, dict) and set(value) == {"tensor"}:
        tensor = value["tensor"]
        return {"array": [tensor["dtype"], tensor["shape"], tensor["values"]]}
    if isinstance(value, dict):
        return {key: simple(item) for key, item in value.items()}
    return [simple(item) for item in value] if isinstance(value, list) else value


def main(folder):
    cases = json.loads((folder / "public.json").read_text())["cases"]
    required = json.loads((folder / "required.json").read_text())
    texts, results = Table(), Table()
    programs = []
    for case in cases:
        name, recorded = case["name"], case["results"]
        text = [b for b in case["backends"] if [name, b] in required["text"]]
        values = [b for b in case["backends"] if [name, b] in required["values"]]
        raises = required["raises"].get(name)
        if not (text or values or raises):
            continue
        program = {key: case[key] for key in HOW}
        for theirs, ours in ADAPTED.items():
            program["program_source"] = program["program_source"].replace(theirs, ours)
        if raises:
            program["raises"] = raises
        else:
            program["text"] = {b: texts.add(recorded[b]["graph"]) for b in text}
            program["grads"] = {b: results.add(simple(recorded[b]["grads"])) for b in values}
            program["out"] = {b: results.add(simple(recorded[b]["out"])) for b in values}
            program["state"] = {b: results.add(simple(recorded[b]["state_after"])) for b in values}
        programs.append(program)
    rows = {"programs": programs, "texts": texts.rows, "results": results.rows}
    parts = [f'"{key}": [\n' + ",\n".join(map(json.dumps, value)) + "\n]" for key, value in rows.items()]
    TARGET.write_text("{" + ",\n".join(parts) + "}\n")
    print(f"{TARGET}: {len(programs)} programs, {len(texts.rows)} texts, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
