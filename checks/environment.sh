# Sourced by gpu.sh and jetson.sh.

# Make an environment that sees the packages of the Python it is made with, PYTHON or python3. Where
# that one is an environment itself, --system-site-packages looks past it, at the Python below.
environment() { # FOLDER
    local outer=${PYTHON:-python3}
    "$outer" -m venv --system-site-packages "$1" || return 1
    "$outer" - "$1" <<'PY'
import sys
import sysconfig
from pathlib import Path

if sys.prefix != sys.base_prefix:
    (packages,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
    seen = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (packages / "outer.pth").write_text(seen, encoding="utf-8")
PY
}
