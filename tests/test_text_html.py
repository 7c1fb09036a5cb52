"""The HTML of a graph shows what its text shows, as HTML that is well formed and needs nothing else."""

import re
from html.parser import HTMLParser

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

import jhop
from jhop._text.html import html
from jhop._text.jax_text import program_of

x = jnp.ones((4, 3), jnp.float32)
_VOID = {"br", "hr", "img", "input", "meta", "link"}


class Page(HTMLParser):
    """Collects text, titles and links, and checks that tags close."""

    def __init__(self, source):
        super().__init__()
        self.open, self.texts, self.titles, self.links, self.tags = [], [], [], [], set()
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        self.titles += [value for key, value in attrs if key == "title"]
        self.links += [value for key, value in attrs if key == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


class Box:
    def __init__(self):
        self.counter = 0


def inlined():
    box = Box()

    def scale(ct):
        box.counter += 1
        kept = jnp.where((ct < 3) & (ct > -3), ct, "<&>'\"".count("&") * 1.0)
        return kept * box.counter

    return jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct * 2.0, fn=scale))(x))


def test_shows_what_the_text_shows():
    gm = inlined()
    page = Page(html(gm))
    program = program_of(gm)
    for row in program.rows:
        assert row.code in page.text
        assert row.type in page.text
    for value in (*program.inputs, *program.outputs):
        assert value.name in page.texts
    for title in ("inputs", "state inputs", "outputs", "state outputs"):
        assert title in page.texts
    assert html(gm) == html(gm)


def test_needs_nothing_else():
    source = html(inlined())
    assert not Page(source).tags & {"script", "img", "link", "iframe"}
    assert "http" not in source and "url(" not in source and "@import" not in source


def test_everything_is_escaped():
    source = html(inlined())
    page = Page(source)
    line = 'kept = jnp.where((ct < 3) & (ct > -3), ct, "<&>\'\\"".count("&") * 1.0)'
    assert any(line in title for title in page.titles)
    assert "(ct < 3)" not in source
    assert "<&>" not in source


def test_names_are_escaped():
    gm = jhop.make_fx(lambda x: x + 1.0)(x)
    object.__setattr__(gm, "made_by", "<script>alert('&')</script>")
    assert "script" not in Page(html(gm)).tags


def test_three_colours():
    source = html(inlined())
    rows = re.findall(r"<div class='jhop-row jhop-(\w+)'>(.*?)</div>", source)
    kinds = {kind: [text for k, text in rows if k == kind] for kind, _ in rows}
    assert set(kinds) == {"input", "step", "hook"}
    assert any("ct_1" in text for text in kinds["input"])
    assert any("ct_1 * 2.0" in text for text in kinds["step"])
    assert any("box_counter + 1" in text for text in kinds["hook"])
    assert not any("ct_1 * 2.0" in text for text in kinds["hook"])


def test_links_to_the_source():
    page = Page(html(inlined()))
    assert any(re.fullmatch(r"file://.*/test_text_html\.py#L\d+", link) for link in page.links)
    assert any(re.fullmatch(r"test_text_html\.py:\d+", text) for text in page.texts)


def test_folds_after_200_rows():
    def long(x):
        for _ in range(250):
            x = x + 1.0
        return x

    gm = jhop.make_fx(long)(x)
    source = html(gm)
    assert "<summary>... 50 more</summary>" in source
    assert source.count("jhop-row") >= 250
    assert "... 1 more" not in source
    Page(source)


def test_functions_fold():
    gm = jhop.make_fx(lambda x: jax.lax.scan(lambda c, row: (c + row, c), x[0], x))(x)
    source = html(gm)
    assert "<summary class='jhop-step'>def body(carry, xs): ... 4 lines</summary>" in source
    assert source.count("<details>") == 1
    Page(source)


def test_opaque_hook_is_a_hook():
    source = html(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda ct: ct))(x))
    assert "jhop-hook'><span class='jhop-name'>trace_wrapped" in source
    assert "hook `&lt;lambda&gt;` (test_text_html.py:" in source


class Odd:
    def __repr__(self):
        raise RuntimeError("no repr")


def test_unknown_primitive():
    odd_p = jex_core.Primitive("<odd>")
    odd_p.def_abstract_eval(lambda x, *, odd: x)
    source = html(jhop.make_fx(lambda x: odd_p.bind(x, odd=Odd()))(x))
    assert "the equation `&lt;odd&gt;`" in source
    Page(source)


def test_notebooks_get_it():
    gm = inlined()
    assert gm._repr_html_() == html(gm)
