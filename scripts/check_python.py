"""Exit with one line that says what to do when this Python cannot run the embedded Triton server.

Runs under any Python 3 before anything is installed, so it uses the standard library alone.
"""

import os
import platform
import sys
import sysconfig

SUPPORTED = ((3, 11), (3, 12))


def problem():  # noqa: ANN201 - no annotations: an old Python must be able to read this file
    """Return why this interpreter will not do, or None."""
    version = "%d.%d" % sys.version_info[:2]  # noqa: UP031 - must parse on any Python 3
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "this needs Linux on x86-64; use the container instead (README.md, section Container)"
    if sys.version_info[:2] not in SUPPORTED:
        return (
            "Python "
            + version
            + " is not supported (onnxruntime 1.32 and numpy 1.26 have wheels for 3.11 and 3.12 only): "
            "install Python 3.11 or 3.12 and run 'make PYTHON=python3.12 ...'"
        )
    if platform.libc_ver()[0] == "glibc" and tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2]) < (
        2,
        35,
    ):
        return (
            "glibc "
            + platform.libc_ver()[1]
            + " is too old for the embedded tritonserver (2.35 or newer): use the container"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return (
            "Python "
            + version
            + " has no venv module: install it (Debian, Ubuntu: apt-get install python"
            + version
            + "-venv)"
        )
    library = "libpython" + version + ".so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR") or "", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
    if not any(os.path.exists(os.path.join(folder, library)) for folder in folders):  # noqa: PTH110, PTH118
        return (
            "Python "
            + version
            + " has no shared library "
            + library
            + ", which Triton's Python backend loads: install it "
            "(Debian, Ubuntu: apt-get install libpython" + version + "; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
        )
    return None


if __name__ == "__main__":
    reason = problem()
    if reason:
        sys.exit("error: " + reason)
