# shellcheck shell=bash
# The tools Drover is built, tried and tested with, and how a bare Debian or Ubuntu gets them.
#
# Sourced by deploy/quickstart, tests/run and .ci/run. Every `need_*` function is idempotent, says what it does
# when that takes longer than a second, and ends the program with the list of packages to install by hand
# where apt or root is missing. etcd and llama-server are unpacked into a cache folder and never installed: that
# needs no root, starts no service on port 2379, and leaves the system as it was.
#
# Settings, all optional:
#   LLAMA_SERVER          the llama-server to use, instead of looking for one
#   DROVER_ETCD           the etcd to use, instead of looking for one
#   DROVER_TOOLS          where downloaded tools are kept (default: ~/.cache/drover/tools)
#   DROVER_LLAMA_SUITES   the Debian or Ubuntu suites to take llama-server from, in the order of trying
#   DROVER_NO_INSTALL=1   never install a package: only say which ones are missing
#
# What it sets, for `drover dev` and the tests: DROVER_LLAMA_SERVER, DROVER_ETCD, DROVER_ETCDCTL, DROVER_TEST_PYTHON.

drover_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"
target_dir="${CARGO_TARGET_DIR:-$drover_root/target}"
tools_root="${DROVER_TOOLS:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/drover/tools}"

say() { printf '%s\n' "$*" >&2; }

# die MESSAGE... : each argument is a line; the first says what is wrong, the others what to do.
die() {
  printf 'error: %s\n' "$1" >&2
  shift
  if (($#)); then printf '       %s\n' "$@" >&2; fi
  exit 1
}

# step TEXT COMMAND... : runs the command quietly, names it, and shows its output only when it fails.
step() {
  local text="$1" log began=$SECONDS
  shift
  log="$(mktemp)"
  printf '  %s … ' "$text" >&2
  if "$@" >"$log" 2>&1 </dev/null; then
    printf 'done (%s s)\n' "$((SECONDS - began))" >&2
    rm -f -- "$log"
  else
    local status=$?
    printf 'failed\n' >&2
    tail -n 30 -- "$log" | sed 's/^/    /' >&2
    rm -f -- "$log"
    return "$status"
  fi
}

# --- Packages of the system -------------------------------------------------------------------------------------

as_root() {
  if ((EUID == 0)); then "$@"; else sudo -n -- "$@"; fi
}

can_install() {
  [[ "${DROVER_NO_INSTALL:-}" != 1 ]] || return 1
  command -v apt-get >/dev/null || return 1
  ((EUID == 0)) || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }
}

# install_packages WHAT-FOR PACKAGE... : from the system's own sources, or a list of what to install by hand.
install_packages() {
  local purpose="$1"
  shift
  if ! can_install; then
    if command -v apt-get >/dev/null; then
      die "missing, for $purpose: $*" "install by hand:  sudo apt-get install $*"
    fi
    die "missing, for $purpose (Debian names): $*" "this system has no apt: install the equivalent packages and run this again"
  fi
  export DEBIAN_FRONTEND=noninteractive
  # A fresh container has no package lists, an old one stale lists: refresh once when the plain attempt fails.
  if ! as_root apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 </dev/null; then
    step "refreshing the package lists" as_root apt-get update ||
      die "apt-get update failed" "mend the system's apt sources, or install by hand: $*"
    step "installing $* (for $purpose)" as_root apt-get install -y --no-install-recommends "$@" ||
      die "could not install $*" "install by hand:  sudo apt-get install $*"
  else
    say "  installed $* (for $purpose)"
  fi
}

# need_build : cargo, a C compiler (TLS crates), the protobuf compiler with its well-known types (etcd-client's build script).
need_build() {
  need_cargo
  local missing=()
  if ! command -v cc >/dev/null; then missing+=(gcc libc6-dev); fi
  # Debian packs the well-known types apart from the compiler, and etcd-client imports them.
  if ! compiles_protos; then missing+=(protobuf-compiler libprotobuf-dev); fi
  if ((${#missing[@]})); then install_packages "the build" "${missing[@]}"; fi
}

# Whether there is a protobuf compiler and it finds google/protobuf/*.proto, as etcd-client's build script will call it.
compiles_protos() {
  local folder status=0
  command -v "${PROTOC:-protoc}" >/dev/null || return 1
  folder="$(mktemp -d)"
  printf 'syntax = "proto3"; import "google/protobuf/descriptor.proto";\n' >"$folder/probe.proto"
  "${PROTOC:-protoc}" --proto_path="$folder" ${PROTOC_INCLUDE:+--proto_path="$PROTOC_INCLUDE"} --descriptor_set_out=/dev/null \
    "$folder/probe.proto" >/dev/null 2>&1 || status=1
  rm -rf -- "$folder"
  return "$status"
}

need_cargo() {
  if ! command -v cargo >/dev/null && [[ -x "${CARGO_HOME:-${HOME:-}/.cargo}/bin/cargo" ]]; then
    export PATH="${CARGO_HOME:-${HOME:-}/.cargo}/bin:$PATH"
  fi
  command -v cargo >/dev/null || die "cargo, Rust's build tool, is missing" \
    "install it by hand: follow https://rustup.rs (Debian's own cargo is too old), open a new shell, run this again"
  local wanted have
  wanted="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$drover_root/Cargo.toml")"
  have="$(rustc --version 2>/dev/null | sed -n 's/^rustc \([0-9.]*\).*/\1/p')"
  if [[ -n "$wanted" && -n "$have" && "$(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1)" != "$wanted" ]]; then
    die "rustc is $have, but $wanted or newer is needed" "bring it up to date:  rustup update stable"
  fi
}

# --- Packages unpacked into the cache ---------------------------------------------------------------------------

# with_lock COMMAND... : one download at a time, whoever else runs this script.
with_lock() {
  mkdir -p -- "$tools_root"
  (
    if command -v flock >/dev/null && ! flock --nonblock 9; then
      say "  waiting for another download into $tools_root"
      flock 9
    fi
    "$@"
  ) 9>"$tools_root/.lock"
}

# apt_aside FOLDER ARGUMENT... : apt-get with lists, cache and status in FOLDER instead of the system's.
apt_aside() {
  local folder="$1"
  shift
  apt-get -q -y -o Dir::State="$folder/state" -o Dir::State::status="$folder/status" -o Dir::Cache="$folder/cache" \
    -o APT::Sandbox::User="" -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
    -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false \
    -o Acquire::IndexTargets::deb::CNF::DefaultEnabled=false -o Acquire::Retries=3 "${apt_sources[@]}" "$@"
}

# unpack_closure FOLDER PATTERN PACKAGE... : downloads the packages and those of their dependencies whose name matches
# PATTERN, and unpacks them below FOLDER/root.
unpack_closure() {
  local folder="$1" pattern="$2" chosen
  shift 2
  mkdir -p -- "$folder"/{state/lists/partial,cache/archives/partial,debs,root}
  : >"$folder/status"
  step "reading the package lists" apt_aside "$folder" update || return 1
  chosen="$(apt_aside "$folder" install --simulate --no-install-recommends "$@" 2>/dev/null |
    awk -v pattern="$pattern" '$1 == "Inst" && $2 ~ pattern { print $2 }')"
  if [[ -z "$chosen" ]]; then
    say "  no package $* there"
    return 1
  fi
  # shellcheck disable=SC2086 # one word per package
  step "downloading $(wc -w <<<"$chosen") packages" download_into "$folder" $chosen || return 1
  local deb
  for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder/root" || return 1; done
  rm -rf -- "$folder/debs" "$folder/state" "$folder/cache" "$folder/status"
}

download_into() {
  local folder="$1"
  shift
  cd -- "$folder/debs" && apt_aside "$folder" download "$@"
}

# shellcheck disable=SC1091
os_release() { (. /etc/os-release && printf '%s' "${!1:-}"); }

# The mirror this system gets its main packages from: whatever its apt is configured with.
main_mirror() {
  # shellcheck disable=SC2016 # the fields are apt's
  apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    awk -v suite="$(os_release VERSION_CODENAME)" '
      $2 == "main" && $1 == suite { print $3; found = 1; exit }
      $2 == "main" && first == "" { first = $3 }
      END { if (!found && first != "") print first }' | head -n 1
}

# --- etcd -------------------------------------------------------------------------------------------------------

# need_etcd : sets DROVER_ETCD and DROVER_ETCDCTL.
need_etcd() {
  local cached="$tools_root/etcd/root/usr/bin"
  if [[ -n "${DROVER_ETCD:-}" ]]; then
    [[ -x "$DROVER_ETCD" ]] || die "DROVER_ETCD names $DROVER_ETCD, which is not an executable file" "correct or unset it"
  elif ! DROVER_ETCD="$(PATH="$PATH:/usr/sbin:/usr/local/bin" command -v etcd)"; then
    if ! { "$cached/etcd" --version && "$cached/etcdctl" version; } >/dev/null 2>&1; then with_lock unpack_etcd || exit 1; fi
    DROVER_ETCD="$cached/etcd"
  fi
  if [[ -z "${DROVER_ETCDCTL:-}" ]] && ! DROVER_ETCDCTL="$(command -v etcdctl)"; then
    if [[ ! -x "$cached/etcdctl" ]]; then with_lock unpack_etcd || exit 1; fi
    DROVER_ETCDCTL="$cached/etcdctl"
  fi
  export DROVER_ETCD DROVER_ETCDCTL
}

unpack_etcd() {
  local folder="$tools_root/etcd" apt_sources=()
  if [[ "${DROVER_NO_INSTALL:-}" == 1 ]] || ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    die "etcd or etcdctl is missing" "install by hand the packages etcd-server and etcd-client, or name one with DROVER_ETCD=path"
  fi
  if "$folder/root/usr/bin/etcd" --version >/dev/null 2>&1; then return 0; fi
  say "etcd: not installed; unpacking it into $folder (no service is started)"
  rm -rf -- "$folder"
  unpack_closure "$folder" '^etcd-' etcd-server etcd-client ||
    die "could not get etcd from this system's apt sources" \
      "install by hand:  sudo apt-get install etcd-server etcd-client" "or name one with DROVER_ETCD=path"
  "$folder/root/usr/bin/etcd" --version >/dev/null || die "the unpacked $folder/root/usr/bin/etcd does not run here"
}

# --- llama-server -----------------------------------------------------------------------------------------------

# need_llama_server : sets DROVER_LLAMA_SERVER.
need_llama_server() {
  local cached="$tools_root/llama/bin/llama-server"
  if [[ -n "${LLAMA_SERVER:-}" ]]; then
    DROVER_LLAMA_SERVER="$LLAMA_SERVER"
    runs "$DROVER_LLAMA_SERVER" || die "LLAMA_SERVER names $LLAMA_SERVER, but '$LLAMA_SERVER --version' fails" \
      "correct it, or unset it to have one found or downloaded"
  elif DROVER_LLAMA_SERVER="$(command -v llama-server)" && runs "$DROVER_LLAMA_SERVER"; then
    :
  else
    if [[ ! -e "$tools_root/llama/.complete" ]] || ! runs "$cached"; then with_lock unpack_llama_server || exit 1; fi
    DROVER_LLAMA_SERVER="$cached"
  fi
  export DROVER_LLAMA_SERVER
}

runs() { [[ -x "$1" ]] && "$1" --version >/dev/null 2>&1 </dev/null; }

unpack_llama_server() {
  local folder="$tools_root/llama" by_hand suite
  if [[ -e "$folder/.complete" ]] && runs "$folder/bin/llama-server"; then return 0; fi
  by_hand="install llama.cpp by hand and name its server:  LLAMA_SERVER=/path/to/llama-server"
  if [[ "${DROVER_NO_INSTALL:-}" == 1 ]] || ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    die "llama-server is missing" "$by_hand" "(on Debian 14 or newer: sudo apt-get install llama.cpp-tools)"
  fi
  local mirror
  mirror="$(main_mirror)"
  [[ -n "$mirror" ]] || die "llama-server is missing, and this system's apt names no mirror to get it from" "$by_hand"

  local suites=() components keyring option=""
  case " $(os_release ID) $(os_release ID_LIKE) " in
    *" ubuntu "*) suites=(devel resolute "$(os_release VERSION_CODENAME)") components="main universe" keyring=ubuntu ;;
    *) suites=(forky sid) components="main" keyring=debian ;;
  esac
  if [[ -n "${DROVER_LLAMA_SUITES:-}" ]]; then read -ra suites <<<"$DROVER_LLAMA_SUITES"; fi
  for keyring in "/usr/share/keyrings/$keyring-archive-keyring".{pgp,gpg}; do
    if [[ -r "$keyring" ]]; then option="[signed-by=$keyring] "; fi
  done

  for suite in "${suites[@]}"; do
    say "llama-server: unpacking the one of $suite into $folder (about 25 MB, once)"
    rm -rf -- "$folder"
    mkdir -p -- "$folder"
    printf 'deb %s%s %s %s\n' "$option" "$mirror" "$suite" "$components" >"$folder/sources.list"
    local apt_sources=(-o Dir::Etc::SourceList="$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null)
    if unpack_closure "$folder" \
      '^(llama\.cpp-tools|libllama|libggml|libmtmd|libc6$|libgcc-s1|libstdc\+\+|libgomp|libssl|libcurl|libzstd|zlib1g|patchelf)' \
      llama.cpp-tools patchelf && assemble_llama_server "$folder"; then
      touch -- "$folder/.complete"
      return 0
    fi
  done
  die "no suite of ${suites[*]} at this system's mirror gave a llama-server that runs here" "$by_hand" \
    "or name other suites:  DROVER_LLAMA_SUITES='…'"
}

# assemble_llama_server FOLDER : the server needs a newer libc than the system has. It gets one of its own: the unpacked loader
# as interpreter, and its own folder as the only place of libraries. The CPU backends must lie beside the executable.
assemble_llama_server() {
  local folder="$1" root="$1/root" loader file
  mkdir -p -- "$folder/bin" "$folder/lib"
  local libraries=(\( -name '*.so' -o -name '*.so.*' \)
    -not -path '*/gconv/*' -not -path '*/ossl-modules/*' -not -path '*/engines-3/*' -not -path '*backends*' -not -name '*.py')
  find "$root" -type f "${libraries[@]}" -exec cp -a -- {} "$folder/lib/" \;
  find "$root" -type l "${libraries[@]}" -print | while IFS= read -r file; do
    if [[ ! -e "$folder/lib/${file##*/}" ]]; then ln -sfn -- "$(basename -- "$(readlink -- "$file")")" "$folder/lib/${file##*/}"; fi
  done
  find "$root" -path '*backends*' -name 'libggml-*.so' -exec cp -a -- {} "$folder/bin/" \;
  cp -- "$root/usr/bin/llama-server" "$folder/bin/llama-server"
  loader="$(find "$folder/lib" -name 'ld-linux*' | head -n 1)"
  if [[ -z "$loader" ]]; then
    say "  the packages brought no loader (ld-linux*)"
    return 1
  fi
  # patchelf runs on the pristine libraries: it must not rewrite the ones it has mapped itself.
  local pristine
  pristine="$(dirname -- "$(find "$root" -type f -name 'libc.so.6' | head -n 1)")"
  local patch=("$loader" --library-path "$pristine" "$root/usr/bin/patchelf")
  "${patch[@]}" --set-interpreter "$loader" "$folder/bin/llama-server" || return 1
  for file in "$folder"/bin/* "$folder"/lib/lib{llama,ggml,mtmd,ssl,crypto,stdc++,curl}*; do
    [[ -f "$file" && ! -L "$file" ]] || continue
    # shellcheck disable=SC2016 # $ORIGIN is for the loader, not for the shell
    "${patch[@]}" --set-rpath '$ORIGIN:$ORIGIN/../lib' "$file" || return 1
  done
  rm -rf -- "$root"
  if ! runs "$folder/bin/llama-server"; then
    say "  it does not run here: $("$folder/bin/llama-server" --version 2>&1 | tail -n 1)"
    return 1
  fi
  say "  $("$folder/bin/llama-server" --version 2>&1 | grep -m 1 -i version || true)"
}

# --- What only tests need ---------------------------------------------------------------------------------------

# need_git : the check of the contract reads earlier states of it.
need_git() {
  if ! command -v git >/dev/null; then install_packages "the check of the contract" git; fi
}

# need_test_python : a virtual environment of the pinned packages; sets DROVER_TEST_PYTHON.
need_test_python() {
  local pins="$drover_root/tests/python/requirements.txt" folder="$target_dir/tools/py" stamp
  if ! command -v python3 >/dev/null || ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    install_packages "the tests that use Python clients" python3 python3-venv
  fi
  # Made anew when the pins or the interpreter change.
  stamp="$(python3 --version) $(cksum <"$pins")"
  if [[ "$(cat -- "$folder/.stamp" 2>/dev/null)" != "$stamp" ]]; then
    rm -rf -- "$folder"
    step "making a Python environment in $folder" make_test_python "$folder" "$pins" ||
      die "could not install the Python packages of $pins" "they are needed by the end-to-end tests only; check pip's configuration"
    printf '%s\n' "$stamp" >"$folder/.stamp"
  fi
  DROVER_TEST_PYTHON="$folder/bin/python"
  export DROVER_TEST_PYTHON
}

make_test_python() {
  python3 -m venv "$1" && "$1/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$2"
}
