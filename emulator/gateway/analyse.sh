#!/bin/sh
# The compiler's static analyser over the gateway, every warning an error.
set -eu
cd "$(dirname "$0")"
cc=${CC:-gcc}
for source in *.c; do
    "$cc" -std=c11 -Wall -Wextra -Wshadow -Werror -O2 -fPIC -fanalyzer -c -o /dev/null "$source"
done
echo "gcc -fanalyzer: nothing found in $(ls ./*.c | wc -l) files"
