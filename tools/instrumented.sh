# For tools/sanitize, coverage and races: builds the extension as the given variable of setup.py says (NAME=VALUE), in a
# folder of its own, and makes that build the one that is imported. Gives $python (PYTHON=... names another interpreter)
# and $work.
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
env "$1" "$python" setup.py -q build --build-base "$work/build" --build-lib "$work/lib"
export PYTHONPATH="$work/lib"

is_imported() { "$python" -c 'import bnfast, sys; assert bnfast.__file__.startswith(sys.argv[1]), bnfast.__file__' "$work"; }
