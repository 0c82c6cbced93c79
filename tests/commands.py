"""The command line under test."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
# Runs the command lines of a JSON list of (exit status, words), one after the other, in one process.
RUN = """
import json, logging, sys
from lorax import cli
logging.basicConfig(stream=sys.stderr)
for status, words in json.loads(sys.argv[1]):
    sys.argv = ["lorax", *words]
    print("=== ", flush=True)
    try:
        cli.main()
        left = 0
    except SystemExit as end:
        left = end.code or 0
    sys.stderr.flush()
    assert left == status, (words[0], left, status)
"""
# Ends the process as soon as something calls out, runs a program or unpickles.
FORBIDDEN = """
import sys
FORBIDDEN = ("socket.", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "urllib.Request", "http.client", "ftplib", "smtplib", "webbrowser", "marshal.load")
import torch, numpy, PIL.Image, rich, typer  # what they do when they are imported is theirs
listening = True
def told(event, arguments):
    if listening and event.startswith(FORBIDDEN) and not (event.startswith("marshal") and by_import()):
        import os
        os.write(2, f"FORBIDDEN: {event} {arguments!r}"[:500].encode())
        os._exit(99)
def by_import():
    frame = sys._getframe(2)
    return "importlib" in frame.f_code.co_filename
sys.addaudithook(told)
"""


def error_of(run, *words):
    """Run what must fail: exit status 1, and exactly one line that starts with `error:`."""
    _, err = run(*words, status=1)
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line
