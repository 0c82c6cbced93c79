"""Python's reader of TOML, which 3.10 does not have: there it is the package that became Python's own."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

loads = tomllib.loads
