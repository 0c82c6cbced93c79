"""The page of the command line in a real browser: what it shows, how it is used, and what it does with bad data."""

import json
from dataclasses import replace

import jsonschema
import pytest

from lorax import Outcome, Row, TransferReport, compare_bases, open_base
from lorax.compare.matching import match_bases
from lorax.models.layers import Layer
from lorax.show.page import page
from lorax.show.view import similarity_view
from lorax.transfer.notes import Code, Note
from tests.chromium import chromium, overlaps, picture, watched
from tests.conftest import REPORT_SCHEMA, small_base
from tests.scored import layout

pytestmark = pytest.mark.slow  # each opens a page in a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def show(browser, tmp_path):
    """Open a page and give it back; at the end nothing may have gone wrong, and nothing been asked for but the page."""
    pages = []

    def call(html, **options):
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(html, encoding="utf-8")
        opened = watched(browser, viewport={"width": 1000, "height": 900}, **options)
        opened.goto(path.as_uri())
        opened.wait_for_selector(".lorax-view")
        pages.append((opened, path.as_uri()))
        return opened

    yield call
    for opened, address in pages:
        assert opened.errors == []
        assert opened.requests == [address]
        opened.context.close()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Two bases of which the second lacks blocks, so that they are matched by similarity."""
    folder = tmp_path_factory.mktemp("pruned")
    source = small_base(folder / "whole.safetensors", transformer_depth=(1, 3), text=False)
    return source, small_base(folder / "pruned.safetensors", change=0.2, transformer_depth=(1, 2), text=False)


@pytest.fixture(scope="module")
def data(pruned):
    return similarity_view(compare_bases(*pruned, attention_only=False), *pruned, match_bases(*pruned))


def details(opened):
    return opened.locator(".lorax-details").inner_text()


def test_similarity_as_a_page(run, show, pruned, tmp_path):
    files = [base.files[0] for base in pruned]
    run("similarity", *files, "--layers", "all", "--html", tmp_path / "page.html")
    opened = show((tmp_path / "page.html").read_text(encoding="utf-8"))
    blocks = [{layer.block or layer.component for layer in open_base(file).layers.values()} for file in files]
    size = opened.eval_on_selector("canvas", "canvas => [canvas.height, canvas.width]")
    assert size == [len(names) for names in blocks]
    assert opened.locator(".lorax-title").inner_text().endswith("full rank")
    picture(opened, "page-similarity-light")


def test_transfer_as_a_page(run, show, bases, lora_file, tmp_path):
    words = ["transfer", lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0]]
    words += ["--output", tmp_path / "out.safetensors", "--threshold", "0.985", "--report", tmp_path / "r.json"]
    run(*words, "--html", tmp_path / "page.html")
    report = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(report, REPORT_SCHEMA)
    opened = show(
        (tmp_path / "page.html").read_text(encoding="utf-8"), permissions=["clipboard-read", "clipboard-write"]
    )
    assert opened.locator(".lorax-figure b >> nth=0").inner_text() == f"{report['arrived']} / {report['layers']}"
    below = report["outcomes"]["below threshold"]
    opened.get_by_role("button", name=f"below threshold {below}").click()
    opened.locator(".lorax-scroll").focus()
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("Enter")
    assert "below threshold" in details(opened)
    assert opened.locator(".lorax-row[aria-selected=true]").count() == 1
    opened.get_by_role("button", name="Copy as text").click()
    opened.wait_for_selector("text=Copied")
    copied = opened.evaluate("navigator.clipboard.readText()")
    assert report["summary"] in copied
    assert all(row["source"] in copied for row in report["rows"])
    picture(opened, "page-transfer-light")


def test_point_pin_and_filter(show, data):
    opened = show(page(data))
    box = opened.locator(".lorax-plot").bounding_box()
    opened.mouse.move(box["x"] + 3, box["y"] + 3)
    first = f"{data['sources']['blocks'][0]}\n"
    assert details(opened).startswith(first)
    opened.mouse.click(box["x"] + 3, box["y"] + 3)
    opened.mouse.move(5, 5)
    assert details(opened).startswith(first)
    assert "pinned" in details(opened)
    opened.select_option("select >> nth=0", label="query")
    assert "attn1.to_q" in opened.locator(".lorax-name >> nth=1").inner_text()
    opened.select_option("select >> nth=1", label="mid")
    assert opened.eval_on_selector("canvas", "canvas => [canvas.height, canvas.width]") == [1, 1]
    assert opened.locator(".lorax-count").inner_text().endswith("of 2 layers would be transferred")
    opened.locator(".lorax-row >> nth=1").click()
    assert "attn2.to_q" in details(opened)


def test_by_keyboard_alone(show, data):
    opened = show(page(data))
    for name in ("kind", "stage"):
        opened.keyboard.press("Tab")
        assert opened.evaluate("document.activeElement.parentElement.textContent").startswith(name)
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.getAttribute('role')") == "application"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        opened.keyboard.press(key)
    row, column = data["sources"]["blocks"][1], data["targets"]["blocks"][1]
    assert details(opened).splitlines()[0].startswith(f"{row}")
    opened.keyboard.press("Enter")
    assert opened.locator(".lorax-pinned").get_attribute("d") == "M1,1h1v1h-1z"
    opened.keyboard.press("Escape")
    assert opened.locator(".lorax-pinned").get_attribute("d") == ""
    opened.keyboard.press("Tab")
    before = opened.locator("output").inner_text()
    opened.keyboard.press("ArrowRight")
    assert float(opened.locator("output").inner_text()) == pytest.approx(float(before) + 0.01)
    opened.keyboard.press("Tab")
    opened.keyboard.press("End")
    opened.keyboard.press("ArrowDown")
    assert "attn" in details(opened) or "conv" in details(opened)
    assert column in opened.content()


def test_the_count_follows_the_threshold(show, data):
    values = [i / len(data["pairs"]) for i in range(len(data["pairs"]))]
    spread = [[target, target, 1, 1, value] for value, (target, *_) in zip(values, data["pairs"], strict=True)]
    opened = show(page(data | {"pairs": spread}))
    slider = opened.locator("input[type=range]")
    box = slider.bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 8)
    opened.mouse.down()
    seen = set()
    for share in (0.4, 0.6, 0.9, 0.97, 0.985):
        opened.mouse.move(box["x"] + box["width"] * share, box["y"] + 8)
        threshold = float(slider.input_value())
        above = sum(value > threshold for value in values)
        assert (
            opened.locator(".lorax-count").inner_text()
            == f"{above} of {len(data['pairs'])} layers would be transferred"
        )
        seen.add(above)
    opened.mouse.up()
    assert len(seen) == 5
    assert opened.locator(".lorax-note").inner_text().endswith(f"--threshold {threshold:.2f}")


def test_the_grade_is_by_what_should_arrive(show):
    """`orthogonal` left out what the target does already: that is no loss, and the whole effect is there."""
    row = Row("unet.a.0.to_q", "unet.a.0.to_q", Outcome.TRANSFERRED, "orthogonal", source_norm=1.0, target_norm=0.3)
    report = TransferReport("style", "a", "b", "auto", 320, 0.0, match_nothing(), [row])
    opened = show(page(report.to_json()))
    words = opened.locator(".lorax-figure >> nth=1").inner_text()
    assert "30 %" in words
    assert "full effect" in words
    assert "in the target already" in words
    assert not opened.locator(".lorax-warnings").is_visible()


@pytest.mark.parametrize(
    ("locale", "language", "words"),
    [
        ("en-US", "en", ["weak effect: only 25%", "1 below threshold", "layers arrived"]),
        ("fr-CA", "fr", ["effet faible\N{NO-BREAK SPACE}: seuls 25", "1 sous le seuil", "couches arrivées"]),
        ("de-DE", "en", ["weak effect: only 25%"]),
    ],
)
def test_the_page_speaks_the_language_of_the_browser(show, locale, language, words):
    lost = Row("unet.b.0.to_q", "unet.b.0.to_q", Outcome.BELOW_THRESHOLD, source_norm=1e-3)
    row = replace(lost, source="unet.a.0.to_q", outcome=Outcome.TRANSFERRED, source_norm=1.0, target_norm=0.25)
    report = TransferReport("style", "a", "b", "auto", 320, 0.0, match_nothing(), [row, lost])
    opened = show(page(report.to_json()), locale=locale)
    said = opened.locator(".lorax-view").inner_text()
    assert [text for text in words if text not in said] == []
    assert opened.evaluate("document.documentElement.lang") == language
    picture(opened, f"page-{locale}")


HOSTILE = "</script><img src=x onerror='window.hacked = 1'><b>&amp;"


def test_text_from_files_stays_text(show, data):
    text = json.dumps(data).replace("attn1.to_q", HOSTILE.replace('"', "'"))
    hostile = json.loads(text) | {"source": HOSTILE, "target": "<!-- <script>"}
    opened = show(page(hostile))
    assert HOSTILE in opened.locator(".lorax-title").inner_text()
    assert opened.evaluate("[window.hacked, document.images.length]") == [None, 0]
    row = Row(HOSTILE, HOSTILE, Outcome.UNREAD, source_norm=1.0, notes=(Note.of(Code.UNREAD, why=HOSTILE),))
    report = TransferReport(HOSTILE, "", "", "auto", 1, 0.0, match_nothing(), [row], unused={HOSTILE: HOSTILE})
    opened = show(page(report.to_json()))
    opened.locator(".lorax-row").click()
    assert details(opened).count(HOSTILE) == 3
    assert opened.locator(".lorax-warnings").inner_text().count(HOSTILE) == 2
    assert opened.evaluate("[window.hacked, document.images.length]") == [None, 0]


BAD = {
    "another version": (lambda data: data | {"schema_version": 9}, "version 9"),
    "an older version": (lambda data: data | {"schema_version": 1}, "older version"),
    "no version": (lambda data: {"schema": data["schema"]}, "cannot read"),
    "cut off": (lambda data: data | {"pairs": data["pairs"][:-3]}, "damaged"),
    "without a table": (lambda data: data | {"targets": None}, "damaged"),
    "no layers": (
        lambda data: data | {"kinds": [], "pairs": []} | {s: data[s] | {"layers": []} for s in ("sources", "targets")},
        "No layer",
    ),
    "a word for a number": (lambda data: data | {"pairs": [[0, 0, "a", 1, 1], *data["pairs"][1:]]}, "damaged"),
    "a report of another version": (lambda data: {"schema": "lorax-transfer", "schema_version": 0}, "version 0"),
    "a report cut off": (lambda data: {"schema": "lorax-transfer", "schema_version": 2, "rows": [{}]}, "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_shown_is_said(show, data, name):
    change, words = BAD[name]
    opened = show(page(change(data)))
    assert words in opened.locator(".lorax-message").inner_text()
    assert opened.locator("canvas").count() == 0


def test_nan_never_gets_into_a_page(data):
    with pytest.raises(ValueError, match="JSON"):
        page(data | {"rank": float("nan")})


def test_two_thousand_layers(show):
    similarity, base = layout(250)
    opened = show(page(similarity_view(similarity, base, base, match_nothing())))
    words = opened.locator(".lorax-message").inner_text()
    assert "Too many pairs" in words
    assert opened.locator(".lorax-row").count() < 60  # those in sight
    opened.locator(".lorax-scroll").evaluate("list => (list.scrollTop = list.scrollHeight)")
    opened.wait_for_selector("text=mid 0.249 attn2.to_o")


def match_nothing():
    from lorax.compare.matching import Assignment

    return Assignment("name", {})


def test_560_x_560_pairs_do_not_stutter(show):
    similarity, base = layout(560, kinds=1)
    opened = show(page(similarity_view(similarity, base, base, match_nothing())))
    assert opened.eval_on_selector("canvas", "canvas => canvas.width * canvas.height") == 560 * 560
    processor = opened.context.new_cdp_session(opened)
    processor.send("Performance.enable", {"timeDomain": "threadTicks"})  # the machine may be busy with something else

    def milliseconds(work):
        def spent():
            metrics = processor.send("Performance.getMetrics")["metrics"]
            return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

        before = spent()
        opened.evaluate(f"() => {{ for (let i = 0; i < 20; i++) ({work})(i / 20); document.body.offsetHeight; }}")
        return (spent() - before) * 1000 / 20

    move = """(share) => {
        const plot = document.querySelector(".lorax-plot"), box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent("pointermove",
            { clientX: box.left + share * box.width, clientY: box.top + share * box.height }));
    }"""
    drag = """(share) => {
        const slider = document.querySelector("input");
        slider.value = share;
        slider.dispatchEvent(new Event("input"));
    }"""
    frame = 16
    assert 0 < milliseconds(move) < frame
    assert 0 < milliseconds(drag) < frame
    picture(opened, "page-560")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 700, 1400])
@pytest.mark.parametrize("what", ["similarity", "transfer"])
def test_nothing_overlaps(run, show, data, bases, lora_file, tmp_path, theme, width, what):
    if what == "transfer":
        words = ["transfer", lora_file, "--source", bases[0].files[0], "--target", bases[1].files[0]]
        words += ["--output", tmp_path / "o.safetensors", "--method", "project", "--rank", 4, "--threshold", "0.985"]
        run(*words, "--html", tmp_path / "page.html")
        html = (tmp_path / "page.html").read_text(encoding="utf-8")
    else:
        html = page(data)
    opened = show(html, color_scheme=theme)
    opened.set_viewport_size({"width": width, "height": 900})
    opened.wait_for_timeout(100)
    picture(opened, f"page-{what}-{theme}-{width}")
    assert overlaps(opened) == []


def test_names_of_layers_of_no_block(show):
    layer = Layer("unet.conv_in", (4, 4))
    assert layer.block == ""
    similarity, base = layout(2, kinds=1)
    view = similarity_view(similarity, base, base, match_nothing())
    for side in ("sources", "targets"):
        view[side]["blocks"][0], view[side]["roles"][0] = "unet", "conv_in"
    opened = show(page(view))
    assert "unet conv_in" in opened.locator(".lorax-rows").inner_text()
