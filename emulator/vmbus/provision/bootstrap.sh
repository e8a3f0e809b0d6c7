#!/bin/sh
# Makes the virtual environment and installs the few Debian packages that the environment, the compiled parts and the
# tests need. Usage: bootstrap.sh VENV
set -eu
venv=$1
log=$(mktemp)
job=
trap 'rm -f "$log"' EXIT
trap '[ -z "$job" ] || kill "$job" 2>/dev/null; exit 130' INT TERM

# step TEXT COMMAND...: prints what is done and how long it took, and on a terminal dots meanwhile. The output of the
# command is shown only if the command fails.
step() {
    text=$1
    shift
    printf '%s' "$text"
    begun=$(date +%s)
    "$@" >"$log" 2>&1 </dev/null &
    job=$!
    while [ -t 1 ] && kill -0 "$job" 2>/dev/null; do
        sleep 1
        printf '.'
    done
    if wait "$job"; then
        job=
        echo " done ($(($(date +%s) - begun)) s)"
    else
        status=$?
        job=
        echo " failed"
        tail -n 30 "$log" >&2
        return "$status"
    fi
}

needed=
wanted=
works() { sh -c "$1" >/dev/null 2>&1; }
works 'python3 -c "import ensurepip, venv"' || needed="$needed python3-venv"
works 'echo "#include <stdint.h>
#include <sys/socket.h>
int main(void){return 0;}" | cc -xc -o /dev/null -' || needed="$needed gcc libc6-dev"
works 'command -v dpkg-deb' || needed="$needed dpkg"
works 'command -v xz' || needed="$needed xz-utils"
works 'command -v iasl' || wanted="$wanted acpica-tools" # one test compiles the ACPI table with it

install_packages() {
    apt-get update -qq || return
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

can_install=no
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    can_install=yes
fi
if [ -n "$needed" ]; then
    if [ "$can_install" = no ]; then
        echo "These Debian packages are missing, and only root can install them. Run as root, then try again:" >&2
        echo "    apt-get install$needed$wanted" >&2
        exit 1
    fi
    # shellcheck disable=SC2086
    step "installing Debian packages:$needed (a minute or two)" install_packages $needed || {
        echo "Check the network and apt's configuration, then run the command again." >&2
        exit 1
    }
fi
if [ -n "$wanted" ]; then
    if [ "$can_install" = no ]; then
        echo "One test will be skipped without this Debian package; as root, run: apt-get install$wanted"
    else
        # shellcheck disable=SC2086
        step "installing Debian packages for the tests:$wanted (under a minute)" install_packages $wanted ||
            echo "One test will be skipped without:$wanted" >&2
    fi
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, and python3 is $(python3 --version). Install a newer one, then try again." >&2
    exit 1
}

# An interrupted attempt leaves a Python without pip.
"$venv/bin/python" -m pip --version >"$log" 2>&1 ||
    step "making the Python environment $venv (some seconds)" python3 -m venv "$venv"
lock=${0%/*}/../../../requirements/dev.lock
# Not -qq: of a network that fails only pip's warnings tell, and they are shown only then.
get() { "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }
# With hashes nothing is built from source: what that needs is not in the lock file. The package itself is built with
# the setuptools of the lock file.
locked() { get --require-hashes --only-binary :all: -r "$lock" && get --no-deps --no-build-isolation -e .; }
unlocked() { get -e '.[dev]'; }
what="installing the emulator and its test tools into $venv (under a minute)"
if ! "$venv/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "$lock has packages for Python 3.11 to 3.13 only: those for this Python are installed without known hashes"
elif step "$what" locked; then
    exit
else
    case $(cat "$log") in
    *"No matching distribution found"*) # a wrong hash is another message, and ends here
        echo "This package index lacks a version in $lock: what it has is installed, without known hashes" >&2 ;;
    *)
        echo "If pip cannot reach its package index: check the network and pip's configuration, then run the command again." >&2
        exit 1
        ;;
    esac
fi
step "$what" unlocked || {
    echo "If pip cannot reach its package index: check the network and pip's configuration, then run the command again." >&2
    exit 1
}
