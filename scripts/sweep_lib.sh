# Sourced by sweep_*.sh: the repository's Python, and its root as the working directory.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
