"""`python tools/report.py` is `slap-report`."""

import sys

from slap_stream.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
