#!/bin/sh
# Makes the virtual environment and sees to the few Debian packages that it and the gateway need.
# Usage: bootstrap.sh VENV
set -eu
venv=$1

missing=""
need() { # need COMMAND-THAT-WORKS PACKAGE
    sh -c "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need 'python3 -c "import ensurepip, venv"' python3-venv
need 'echo "#include <stdint.h>
#include <sys/socket.h>
int main(void){return 0;}" | cc -xc -o /dev/null -' 'gcc libc6-dev'
need 'command -v dpkg-deb' dpkg
need 'command -v xz' xz-utils

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing Debian packages:$missing"
        apt-get update -qq
        # shellcheck disable=SC2086  # a list of package names
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    else
        echo "These Debian packages are missing; as root, run:" >&2
        echo "    apt-get install$missing" >&2
        exit 1
    fi
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; this is $(python3 --version)" >&2
    exit 1
}

echo "installing the emulator and what its tests need into $venv"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
