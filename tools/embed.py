"""`python tools/embed.py` is `slap-embed`."""

import sys

from slap_stream.cli.embed import main

if __name__ == "__main__":
    sys.exit(main())
