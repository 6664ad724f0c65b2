"""`python -m vlmfix.demo`: the same as `vlmfix demo`."""

import sys

from vlmfix.cli import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]], prog_name="python -m vlmfix.demo")
