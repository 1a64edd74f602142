#!/usr/bin/env bash
# Makes the environment in .venv: packages, the m6 command, DeepSpeed's compiled operators.
# Safe to repeat and to interrupt; takes a second when nothing is to do.
#
#   M6_PYTHON             the Python to use (3.11 or newer); python3 if unset
#   M6_TORCH_INDEX        an extra package index for torch, such as PyTorch's own of CPU builds, which saves gigabytes
#   TORCH_EXTENSIONS_DIR  where compiled operators are kept; .venv/torch_extensions if unset
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
stamp="$venv/m6-setup" # what .venv was made for; absent until it is complete
# A user's own site-packages must not leak into the environment.
export PYTHONNOUSERSITE=1

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

gpu_here() { nvidia-smi -L >/dev/null 2>&1; }

# The Python that was asked for, else the one that .venv was made with, else python3.
choose_python() {
    python="${M6_PYTHON:-$(cat "$venv/m6-python" 2>/dev/null || echo python3)}"
    version="$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)" ||
        fail "$python does not run: install Python 3.11 or newer, or name one with M6_PYTHON=/path/to/python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is Python $version, 3.11 or newer is needed: name one with M6_PYTHON=/path/to/python"
    # Where .venv is activated, python3 is its own: what it was made with is meant.
    python="$("$python" -c 'import sys; print(sys._base_executable if sys.prefix == sys.argv[1] else sys.executable)' "$venv")"
    # What .venv belongs to. Its scripts hold its path, so a moved checkout needs a new one.
    place="$root $("$python" -c 'import sys; print(sys.prefix)') $version"
}

venv_fits() {
    [ "$(cat "$venv/m6-place" 2>/dev/null)" = "$place" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

site_packages() { "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

make_venv() {
    say "making .venv with Python $version ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python cannot make virtual environments: apt-get install python3-venv"
    if "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
        share_packages
    fi
    printf '%s\n' "$python" >"$venv/m6-python"
    printf '%s\n' "$place" >"$venv/m6-place"
}

# The chosen Python's torch sees a GPU, so it fits the driver: it is used, not replaced.
# Not `venv --system-site-packages`, which would skip over a Python that is itself a virtual environment.
share_packages() {
    "$python" -c 'import site
for path in site.getsitepackages():
    print(f"import site; site.addsitedir({path!r})")' >"$(site_packages)/m6_base.pth"
    "$python" -c 'import torch; print("torch==" + torch.__version__)' >"$venv/m6-base-torch"
    say "using the $(cat "$venv/m6-base-torch") that is installed: it sees a GPU"
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        fail "pip install failed, see its message above; then run launch/setup.sh again"
}

install_torch_and_packages() {
    local index=() torch
    [ -z "${M6_TORCH_INDEX:-}" ] || index=(--extra-index-url "$M6_TORCH_INDEX")
    torch="$(grep '^torch==' requirements.txt)"
    say "installing $torch (200 MB or more, once)"
    pip_install --no-deps "${index[@]}" "$torch"
    say "installing the other packages (about 500 MB, once)"
    pip_install --requirement requirements.txt
}

# Only what is missing, at the pinned version: there may be no network, and nothing is missing.
install_around_torch() {
    local missing
    mapfile -t missing < <("$venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata
import re

here = {re.sub(r"[-_.]+", "-", item.metadata["Name"]).lower() for item in metadata.distributions()}
for line in open("requirements.txt"):
    name = re.match(r"[\w.-]+", line)
    if name and re.sub(r"[-_.]+", "-", name[0]).lower() not in here:
        print(line.strip())
PYTHON
    )
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    pip_install --constraint "$venv/m6-base-torch" "${missing[@]}"
}

# The project's folder and the m6 command. Unlike `pip install --editable`, this needs no setuptools,
# which some environments lack or have too old, and so no network.
install_project() {
    printf '%s\n' "$root" >"$(site_packages)/m6.pth"
    cat >"$venv/bin/m6" <<'COMMAND'
#!/bin/sh
exec "$(dirname "$(readlink -f "$0")")/python" -P -c 'from launch.cli import main; main()' "$@"
COMMAND
    chmod +x "$venv/bin/m6"
}

install_packages() {
    local wanted
    wanted="$place $(cat requirements.txt launch/setup.sh | sha256sum | cut -d' ' -f1)"
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    venv_fits || make_venv
    rm -f "$stamp"
    if [ -f "$venv/m6-base-torch" ]; then
        install_around_torch
    else
        install_torch_and_packages
    fi
    install_project
    printf '%s\n' "$wanted" >"$stamp"
}

check_compiler() {
    local headers
    command -v g++ >/dev/null || fail "g++ is missing, DeepSpeed compiles its operators with it: apt-get install g++"
    PATH="$venv/bin:$PATH" ninja --version >/dev/null 2>&1 || fail "ninja does not run: remove .venv and run launch/setup.sh again"
    headers="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
    [ -f "$headers/Python.h" ] || fail "$headers/Python.h is missing: apt-get install python3-dev"
}

have_libaio() { echo 'int main() {}' | g++ -x c++ -include libaio.h - -laio -o /dev/null 2>/dev/null; }

# libaio is for NVMe offload, numactl for binding ranks to cores: good to have, not needed.
install_system_packages() {
    local missing=()
    have_libaio || missing+=(libaio-dev)
    command -v numactl >/dev/null || missing+=(numactl)
    if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -f "$venv/m6-apt.log" ]; then
        say "apt-get install ${missing[*]}"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"; } \
            >"$venv/m6-apt.log" 2>&1 </dev/null || say "apt-get failed, its messages are in .venv/m6-apt.log"
    fi
    have_libaio || say "NVMe offload is off: apt-get install libaio-dev, then run launch/setup.sh again"
}

choose_python
install_packages
check_compiler
install_system_packages
"$venv/bin/python" -m launch.operators
