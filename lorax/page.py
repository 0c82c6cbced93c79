"""One self-contained page with the views of the nodes: the same JavaScript, and the JSON that it shows."""

import json
import re
from pathlib import Path
from typing import Any

# Beside the package in a checkout, inside of it where it is installed.
WEB = next(path for path in (Path(__file__).parent / "web", Path(__file__).parents[1] / "web") if path.is_dir())
# Each after what it imports.
SCRIPTS = (
    "elements",
    "texts",
    "names",
    "colours",
    "similarity_data",
    "heatmap",
    "bars",
    "threshold",
    "similarity_view",
    "report_data",
    "report_view",
    "page",
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>LoRA-X</title>
<style>
{style}
:root {{ color-scheme: light dark; --input-text: light-dark(#222, #ddd); --descrip-text: light-dark(#666, #999);
  --border-color: light-dark(#bbb, #4e4e4e); --comfy-input-bg: light-dark(#fff, #222); --comfy-menu-bg: light-dark(#eee, #353535) }}
body {{ margin: 0; background: light-dark(#eee, #181818) }}
#lorax-view {{ box-sizing: border-box; max-width: 900px; height: 100vh; min-height: 760px; margin: 0 auto; padding: 16px }}
.lorax-view {{ font-size: 13px }}
</style>
</head>
<body>
<main id="lorax-view"></main>
<script type="application/json" id="lorax-data">{data}</script>
<script type="module">
{script}
</script>
</body>
</html>
"""


def page(data: dict[str, Any]) -> str:
    """Return an HTML page that shows the JSON of a similarity (`similarity_view`) or a transfer (`TransferReport`).

    It asks for nothing else: scripts and style stand in it, and a browser is told to load nothing.

    Args:
        data: Plain data without NaN. No text of it can end the script that it stands in.
    """
    scripts = [(WEB / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    # The files are modules; one after the other they are one, without what ties them.
    tied = re.compile(r"^import\s[^;]*;\n|^export (?=const |function |class )", re.MULTILINE)
    return PAGE.format(
        style=(WEB / "view.css").read_text(encoding="utf-8"),
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script="\n".join(tied.sub("", script) for script in scripts),
    )
