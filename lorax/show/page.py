"""One self-contained page with the views of the nodes: the same JavaScript, and the JSON that it shows."""

import json
import re
from pathlib import Path
from typing import Any

# Where `web` and `locales` are: inside of the package where it is installed, beside it in a checkout.
PLACES = (Path(__file__).parents[1], Path(__file__).parents[2])
# Each after what it imports.
SCRIPTS = (
    "checks",
    "elements",
    "texts",
    "names",
    "colours",
    "similarity_data",
    "heatmap",
    "bars",
    "threshold",
    "similarity_view",
    "report_pack",
    "report_data",
    "report_view",
)
# Not in `web`, all of which ComfyUI loads.
PAGE_SCRIPT, PAGE_STYLE = (Path(__file__).with_name(f"page.{end}") for end in ("js", "css"))
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>LoRA-X</title>
<style>
{style}
</style>
</head>
<body>
<main id="lorax-view"></main>
<script type="application/json" id="lorax-data">{data}</script>
<script type="application/json" id="lorax-texts">{texts}</script>
<script type="module">
{script}
</script>
</body>
</html>
"""


def page(data: dict[str, Any]) -> str:
    """Return an HTML page that shows the JSON of a similarity (`similarity_view`) or a transfer (`TransferReport`).

    It asks for nothing else: scripts, style and texts stand in it, and a browser is told to load nothing. It speaks the
    first of the browser's languages that is English or has texts in `locales/`.

    Args:
        data: Plain data without NaN. No text of it can end the script that it stands in.
    """
    root = next(path for path in PLACES if (path / "web").is_dir())
    web = root / "web"
    texts = {path.parent.name: json.loads(path.read_bytes())["lorax"] for path in root.glob("locales/*/main.json")}
    scripts = [path.read_text(encoding="utf-8") for path in (*(web / f"{name}.js" for name in SCRIPTS), PAGE_SCRIPT)]
    # The files are modules; one after the other they are one, without what ties them.
    tied = re.compile(r"^import\s[^;]*;\n|^export (?=const |function |class )", re.MULTILINE)
    return PAGE.format(
        style="".join(path.read_text(encoding="utf-8") for path in (web / "view.css", PAGE_STYLE)),
        data=_json(data),
        texts=_json(texts),
        script="\n".join(tied.sub("", script) for script in scripts),
    )


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
