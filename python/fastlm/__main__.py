"""`python -m fastlm`: the same command line as `fastlm`."""

from fastlm.cli.main import run

run()
