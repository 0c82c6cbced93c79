"""The pack, imported as the host does it: under another name; without its nodes, which need a server."""

import importlib
import sys
import types


def load_pack(root):
    """Return the packages `nodes.host` and `lorax` of the pack in a folder."""
    for name, path in (("lora_x_pack", root), ("lora_x_pack.nodes", root / "nodes")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    return importlib.import_module("lora_x_pack.nodes.host"), importlib.import_module("lora_x_pack.lorax")
