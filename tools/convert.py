"""`python tools/convert.py` is `slap-convert`."""

import sys

from slap_stream.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
