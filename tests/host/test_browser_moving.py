"""The moving picture of the README: a threshold is dragged, and the next queue uses it."""

from chromium import moving_picture
from front_end import at_scale, build, front_end, nothing_wrong, queue, threshold_widget

NODES = [
    ("CheckpointLoaderSimple", [-700, 60], {"ckpt_name": "sd15-base.safetensors"}, {}),
    ("CheckpointLoaderSimple", [-700, 220], {"ckpt_name": "sd15-tuned.safetensors"}, {}),
    ("LoraXLoader", [-700, 400], {"lora_name": "sd15-style.safetensors"}, {}),
    ("LoraXSimilarity", [0, 60], {}, {"source": (0, 0), "target": (1, 0)}),
    (
        "LoraXTransfer",
        [500, 60],
        {"rank": 34},
        {"source": (0, 0), "target": (1, 0), "adapter": (2, 0), "similarity": (3, 0)},
    ),
]
SCALE = 0.75
# Around both nodes, with their titles, where `at_scale` puts them.
CLIP = {"x": 80, "y": 105, "width": 960 * SCALE + 20, "height": 600}


def test_a_dragged_threshold_in_a_moving_picture(host, browser):
    """Fewer layers the higher it is, in the view, in the widget and in what arrives."""
    with front_end(host, browser) as page:
        build(page, *NODES)
        at_scale(page, SCALE)
        queue(page)
        slider = page.locator(".lorax-similarity input[type=range]")
        box = slider.bounding_box()
        middle = box["y"] + box["height"] / 2
        thumb = 16 * SCALE

        def at(value):
            return box["x"] + thumb / 2 + (box["width"] - thumb) * (value + 0.25) / 1.24

        frames = [(page.screenshot(clip=CLIP), 1200)]
        counts = []
        page.mouse.move(at(0), middle)
        page.mouse.down()
        for step in [*range(6, 100, 6), 98]:
            page.mouse.move(at(step / 100), middle)
            page.wait_for_timeout(60)
            counts.append(int(page.locator(".lorax-similarity .lorax-count").inner_text().split()[0]))
            frames.append((page.screenshot(clip=CLIP), 100))
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1]
        for step in range(96, 88, -2):
            page.mouse.move(at(step / 100), middle)
            page.wait_for_timeout(60)
            frames.append((page.screenshot(clip=CLIP), 160))
        page.mouse.up()
        above = int(page.locator(".lorax-similarity .lorax-count").inner_text().split()[0])
        assert 0 < above < counts[0]
        frames.append((page.screenshot(clip=CLIP), 800))
        queue(page)
        assert threshold_widget(page) == float(slider.input_value())
        arrived, count = map(int, page.locator(".lorax-report .lorax-figure b >> nth=0").inner_text().split(" / "))
        assert 0 < arrived < count
        frames.append((page.screenshot(clip=CLIP), 2500))
        assert moving_picture("threshold", frames).stat().st_size < 1_000_000
        nothing_wrong(page, host)
