"""`python -m fastlm`: the same command line as `fastlm`."""

import sys

from fastlm.cli.main import main

sys.exit(main())
