"""Checks that this machine can make the virtual environment, before anything is downloaded. Prints the exact remedy.

Runs under any Python 3, so that an old one gets a sentence and not a SyntaxError.
"""

import os
import shutil
import sys
import sysconfig

NEEDED_GB = 3.0
CUDA_GB = 8.0  # with PyTorch's CUDA build, which pip takes on Linux


def problems(venv):
    """(what is wrong and the remedy, whether it stops the installation) for each problem."""
    found = []
    if sys.version_info < (3, 10):
        version = "%d.%d" % sys.version_info[:2]
        found.append(("Python %s at %s is too old: fastlm needs 3.10 or newer. Install one and name it: "
                      "make PYTHON=python3.12 ..." % (version, sys.executable), True))  # fmt: skip
    try:
        import ensurepip
        import venv as _venv

        del ensurepip, _venv
    except ImportError:
        found.append(("Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install python3-venv", True))
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    native = os.environ.get("FASTLM_NATIVE", "AUTO").upper()
    if native != "OFF":
        strict = native == "ON"
        if not compiler:
            found.append(("no C++ compiler was found: the pure-Python package will be installed, without the CPU "
                          "kernels. On Debian or Ubuntu: sudo apt-get install g++; on macOS: xcode-select --install",
                          strict))  # fmt: skip
        elif not os.path.exists(header):
            found.append(("Python's headers are missing (%s). On Debian or Ubuntu: sudo apt-get install python3-dev; "
                          "or set FASTLM_NATIVE=OFF to install without the CPU kernels" % header, True))  # fmt: skip
    folder = os.path.dirname(os.path.abspath(venv))
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB and not os.path.exists(venv):
        found.append(("%s has %.1f GB free; the environment needs %.0f GB. Free some, or put it elsewhere: "
                      "make VENV=/path/to/venv ..." % (folder, free, NEEDED_GB), True))  # fmt: skip
    elif free < CUDA_GB and not os.path.exists(venv) and sys.platform == "linux" and not os.environ.get("TORCH_INDEX"):
        found.append(("%s has %.1f GB free; PyTorch's CUDA build, which pip may take, needs about %.0f GB. Its CPU build: "
                      "make TORCH_INDEX=... (README, Install)" % (folder, free, CUDA_GB), False))  # fmt: skip
    return found


def main():
    stop = False
    for text, fatal in problems(sys.argv[1] if len(sys.argv) > 1 else ".venv"):
        sys.stderr.write("%s: %s\n" % ("error" if fatal else "note", text))
        stop = stop or fatal
    return 1 if stop else 0


if __name__ == "__main__":
    sys.exit(main())
