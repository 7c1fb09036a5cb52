"""docs/RULES.md has a row for each of PyTorch's 138 rules of hooks, and each row has its tests, in each mode.

Tests are named after rules, `test_rule_007_...`, in test_rules_*.py. One that is parametrised by `each_mode` runs its
program eagerly, compiled, and captured; where no test of a rule does, `WITHOUT_MODES` says why.
"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \| (.+) \| (same|differs|none) \| (.*?) ?\|$",
    (TESTS.parent / "docs" / "RULES.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
NUMBERS = range(1, 139)

NO_PASS = "it is about making a Tensor or a graph, and no backward pass runs"
OUTSIDE = "eager and captured: what it is about belongs to Tensors outside of compiled functions"
NOT_EAGER = "compiled and captured: eagerly, nothing is traced"
CAPTURE = "it is about captured passes themselves"
JAX = "it is about functions of plain JAX: as they are, under jax.jit and under jhop.jit"
WITHOUT_MODES = {
    11: NO_PASS,
    19: OUTSIDE,
    50: OUTSIDE,
    59: OUTSIDE,
    91: "there is no such function to run in a mode",
    94: "it is about one whole graph; rule 93 has the modes",
    99: CAPTURE,
    100: JAX,
    102: JAX,
    109: NO_PASS,
    110: NO_PASS,
    111: NOT_EAGER,
    113: CAPTURE,
    125: NOT_EAGER,
    127: NOT_EAGER,
    129: NOT_EAGER,
    130: CAPTURE,
    131: CAPTURE,
    132: CAPTURE,
    133: CAPTURE,
    135: CAPTURE,
}


def rule_tests(folder):
    """By rule, the tests named after it: (file, name, whether it runs in each mode)."""
    found = {}
    for path in sorted(folder.glob("test_rules_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.FunctionDef) and re.match(r"test_rule_(\d{3})_\w", node.name)
            if named:
                modes = any(isinstance(mark, ast.Name) and mark.id == "each_mode" for mark in node.decorator_list)
                found.setdefault(int(named[1]), []).append((path.name, node.name, modes))
    return found


FOUND = rule_tests(TESTS)


def test_the_table_has_a_row_for_each_rule_in_order():
    assert [int(number) for number, *_ in ROWS] == list(NUMBERS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_says_what_is_different(row):
    _, rule, kind, says = row
    assert len(rule) > 15
    assert kind == "same" or len(says) > 30


@pytest.mark.parametrize("number", NUMBERS)
def test_a_rule_has_tests_in_each_mode_or_a_reason(number):
    assert number in FOUND, "no test is named after it"
    in_modes = any(modes for _, _, modes in FOUND[number])
    assert in_modes != (number in WITHOUT_MODES)


def test_no_test_is_named_after_a_rule_that_there_is_not():
    assert set(FOUND) <= set(NUMBERS)


def test_names_are_told_apart():
    names = [name for tests in FOUND.values() for _, name, _ in tests]
    assert len(set(names)) == len(names) > 150


def test_a_file_without_rules_would_be_noticed(tmp_path):
    (tmp_path / "test_rules_a.py").write_text("@each_mode\ndef test_rule_007_x(mode): ...\ndef test_other(): ...\n")
    assert rule_tests(tmp_path) == {7: [("test_rules_a.py", "test_rule_007_x", True)]}
