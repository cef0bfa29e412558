# For tools/sanitize and tools/coverage: the extension, built as the named variable of setup.py says, in a folder of its own.
# Gives $python (PYTHON=... names another interpreter) and $work, and makes that build the one that is imported.
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
env "$1=1" "$python" setup.py -q build --build-base "$work/build" --build-lib "$work/lib"
export PYTHONPATH="$work/lib"

is_imported() { "$python" -c 'import bnfast, sys; assert bnfast.__file__.startswith(sys.argv[1]), bnfast.__file__' "$work"; }
