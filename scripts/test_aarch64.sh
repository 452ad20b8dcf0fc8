#!/usr/bin/env bash
# Builds the kernels for aarch64 and runs the self-test and the operators' tests there, under qemu's
# user-mode emulation. Needs no Arm machine, no root, and changes nothing on this one.
#
#   scripts/test_aarch64.sh [--torch VERSION] [--cache FOLDER] [--selftest] [-- PYTEST ARGUMENTS]
#
#   --torch     the torch to run with; default: the oldest that ember-ext works with. The build is
#               always made against that one, so another version shows that one build is enough.
#               From 2.11 on torch's wheels for aarch64 have CUDA: 3 GB to fetch, 5 GB on disk.
#   --cache     where downloads and the build stay; default: ~/.cache/ember_ext/aarch64
#   --selftest  only `python -m ember_ext`, without pytest
#
# The Arm Python and its libraries are Debian packages, unpacked into a folder. Emulation is some 20
# times slower than the machine: expect 20 minutes for the self-test, and several times as long for
# all tests. PYTEST ARGUMENTS, such as python_tests/test_rounding.py, choose among them.
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=2.10.0
torch=$oldest
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ember_ext/aarch64
pytest=1
tests=()
while (($#)); do
  case $1 in
    --torch) torch=$2 && shift 2 ;;
    --cache) cache=$2 && shift 2 ;;
    --selftest) pytest=0 && shift ;;
    --) shift && tests=("$@") && break ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
  esac
done
if ((${#tests[@]} == 0)); then
  for name in rounding lif_gate lif_attention refractory_lif_attention cfc_scan ltc_scan; do
    tests+=("python_tests/test_$name.py")
  done
fi

say() { printf '\n== %s\n' "$*"; }
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg-deb cmake ninja uv; do
  command -v "$tool" >/dev/null && continue
  echo "test_aarch64.sh needs $tool: on Debian, apt-get install g++-aarch64-linux-gnu qemu-user," \
    "and pip install cmake ninja uv" >&2
  exit 2
done
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

# An apt of our own, which believes in a machine that is arm64 and has nothing installed.
root=$cache/root apt=$cache/apt
if [[ ! -e $root/complete ]]; then
  say "An Arm Python from Debian's packages, in $root"
  rm -rf "$root" "$apt"
  mkdir -p "$root" "$apt"/lists/partial "$apt"/archives/partial
  touch "$apt/status"
  sources=/etc/apt/sources.list.d/debian.sources
  [[ -e $sources ]] || sources=/etc/apt/sources.list
  arm_apt() {
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 \
      -o Dir::State="$apt" -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status" \
      -o Dir::Cache="$apt" -o Dir::Cache::archives="$apt/archives" \
      -o Dir::Etc::sourcelist="$sources" -o Dir::Etc::sourceparts=- "$@"
  }
  arm_apt update
  arm_apt install --yes --download-only --no-install-recommends python3 libstdc++6
  for package in "$apt"/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
  touch "$root/complete"
fi
python=$(basename "$root"/usr/bin/python3.*[0-9])
emulated=$cache/python
cat >"$emulated" <<EOF
#!/bin/sh
exec qemu-aarch64 -L "$root" "$root/usr/bin/$python" "\$@"
EOF
chmod +x "$emulated"
# Tests that start a Python must start an emulated one.
mkdir -p "$cache/hook"
echo "import sys; sys.executable = '$emulated'" >"$cache/hook/sitecustomize.py"

install_torch() {
  local site=$cache/torch-$1
  [[ -e $site/complete ]] && return
  say "torch $1 for aarch64 and what the tests need, in $site"
  rm -rf "$site"
  uv pip install --python-platform aarch64-manylinux_2_28 --python-version "${python#python}" \
    --only-binary :all: --target "$site" "torch==$1" ncps numpy hypothesis pytest pytest-timeout sybil
  touch "$site/complete"
}
install_torch "$oldest"
install_torch "$torch"

say "Cross-compiling against torch $oldest"
build=$cache/build
cmake -G Ninja -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DEMBER_CUDA=OFF \
  -DEMBER_TORCH_DIR="$cache/torch-$oldest/torch" \
  -DSKBUILD_PROJECT_VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ember_ext/__init__.py)"
cmake --build "$build"
rm -rf "$cache/site"
cmake --install "$build" --prefix "$cache/site"
cp -r ember_ext "$cache/site"

export PYTHONPATH=$cache/hook:$cache/site:$cache/torch-$torch PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
say "Self-test with torch $torch"
(cd "$cache" && time "$emulated" -m ember_ext)
if ((pytest)); then
  say "Tests with torch $torch"
  # Emulation is slow, and not what a deadline of hypothesis is about.
  time "$emulated" -m pytest -q -p no:cacheprovider --timeout 1800 -m "not cuda and not slow" "${tests[@]}"
fi
