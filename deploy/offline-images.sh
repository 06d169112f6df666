#!/usr/bin/env bash
# Owns: a Docker Engine and stand-in base images on a Debian or Ubuntu machine that reaches its package mirror and npm
# but no image registry. Needs root. Idempotent: with the engine up and the images current it only looks and returns.
#
#   lamina-offline/node:local   the distribution (debootstrap) + this machine's Node, npm, CA bundle and apt settings
#   lamina-offline/nats:local   the same + the distribution's nats-server, with busybox as wget for the health check
#
# Then:  export LAMINA_NODE_IMAGE=lamina-offline/node:local NATS_IMAGE=lamina-offline/nats:local LAMINA_BUILD_NETWORK=host
#        docker-compose build && docker-compose up        (deploy/offline-images.sh --engine-only stops before the images)
set -euo pipefail

node_tag=lamina-offline/node:local
nats_tag=lamina-offline/nats:local
dockerd_log=${TMPDIR:-/tmp}/lamina-dockerd.log
ca_bundle=/etc/ssl/certs/ca-certificates.crt

say() { echo "offline-images: $*"; }
die() { echo "offline-images: $*" >&2; exit 1; }
engine_up() { timeout 10 docker info >/dev/null 2>&1; }

apt_updated=no
install_packages() { # installs what is missing of "command:package ..."
  local missing=() pair
  for pair in "$@"; do command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}"); done
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null || die "needs apt-get (Debian or Ubuntu) to install: ${missing[*]}"
  [ "$(id -u)" = 0 ] || die "must be root to install: ${missing[*]}"
  say "installing ${missing[*]}"
  [ $apt_updated = yes ] || { apt-get update -qq </dev/null; apt_updated=yes; }
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" </dev/null >/dev/null
}

# One try of dockerd with the given options; it outlives this script. Fails when it ends or does not answer in time.
try_dockerd() {
  echo "== dockerd $*" >>"$dockerd_log"
  setsid nohup dockerd "$@" </dev/null >>"$dockerd_log" 2>&1 &
  local pid=$!
  for _ in $(seq 60); do
    sleep 0.5
    engine_up && return 0
    kill -0 "$pid" 2>/dev/null || return 1
  done
  kill "$pid" 2>/dev/null || true
  for _ in $(seq 20); do kill -0 "$pid" 2>/dev/null || break; sleep 0.5; done
  return 1
}

start_engine() {
  install_packages docker:docker.io
  engine_up && return
  install_packages dockerd:docker.io
  [ "$(id -u)" = 0 ] || die "no Docker Engine answers; start one, or run this as root"
  if [ -d /run/systemd/system ]; then
    systemctl start docker && engine_up && return
  fi
  say "starting dockerd (log: $dockerd_log)"
  # Plain first; then without what some kernels and sandboxes refuse.
  try_dockerd && return
  say "plain dockerd did not start; trying without iptables"
  try_dockerd --iptables=false --ip6tables=false && return
  say "trying the vfs storage driver"
  try_dockerd --storage-driver=vfs && return
  try_dockerd --iptables=false --ip6tables=false --storage-driver=vfs && return
  tail -n 20 "$dockerd_log" >&2
  die "dockerd does not start on this machine"
}

root=
cleanup() { [ -z "$root" ] || rm -rf --one-file-system "$root"; }
trap cleanup EXIT

# The image's recipe: rebuilt when this script, Node or the CA bundle change.
recipe() { { cat "${BASH_SOURCE[0]}"; node --version; cat "$ca_bundle" 2>/dev/null; } | sha256sum | cut -c1-16; }
current() { [ "$(docker image inspect --format '{{index .Config.Labels "lamina.recipe"}}' "$1" 2>/dev/null)" = "$2" ]; }

build_node_image() {
  local recipe=$1 suite mirror node_bin npm_dir library
  install_packages debootstrap:debootstrap
  command -v node >/dev/null && command -v npm >/dev/null || die "needs node and npm on this machine: they are copied into the image"
  [ "$(id -u)" = 0 ] || die "debootstrap needs root"
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v suite="$suite" '$2 == suite { print $1; exit }')
  root=$(mktemp -d)
  say "making $node_tag ($suite, Node $(node --version)); about a minute"
  debootstrap --variant=minbase --include=ca-certificates,libstdc++6,busybox "$suite" "$root" "${mirror:-http://deb.debian.org/debian}" >"$root.log" 2>&1 ||
    { tail -n 20 "$root.log" >&2; die "debootstrap failed"; }
  rm -f "$root.log"

  node_bin=$(node -p process.execPath)
  npm_dir=$(readlink -f "$(npm root -g 2>/dev/null)/npm")
  install -D -m 755 "$node_bin" "$root/usr/local/bin/node"
  # Shared libraries of a Node that was not linked like the official one (distribution packages).
  ldd "$node_bin" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | while read -r library; do
    [ -e "$root/$library" ] || install -D -m 644 "$(readlink -f "$library")" "$root/usr/local/lib/$(basename "$library")"
  done
  mkdir -p "$root/usr/local/lib/node_modules"
  cp -r "$npm_dir" "$root/usr/local/lib/node_modules/npm"
  ln -sf ../lib/node_modules/npm/bin/npm-cli.js "$root/usr/local/bin/npm"
  ln -sf ../lib/node_modules/npm/bin/npx-cli.js "$root/usr/local/bin/npx"
  cp "$ca_bundle" "$root$ca_bundle"
  apt-config dump | grep -E '^Acquire::(http|https|Check-|ForceIPv)' >"$root/etc/apt/apt.conf.d/99machine" || true
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*
  chroot "$root" ldconfig
  tar -C "$root" -c . | docker import --change "LABEL lamina.recipe=$recipe" --change "ENV NODE_EXTRA_CA_CERTS=$ca_bundle" \
    --change 'CMD ["node"]' - "$node_tag" >/dev/null
  docker run --rm --network none "$node_tag" sh -c 'node --version && npm --version' >/dev/null || die "$node_tag does not run Node"
}

build_nats_image() {
  local recipe=$1 context
  install_packages nats-server:nats-server
  context=$(mktemp -d)
  cp "$(readlink -f "$(command -v nats-server)")" "$context/nats-server"
  printf '%s\n' "FROM $node_tag" 'COPY nats-server /usr/local/bin/nats-server' \
    'RUN ln -sf /bin/busybox /usr/local/bin/wget && rm -rf /usr/local/bin/node /usr/local/lib/node_modules' \
    "LABEL lamina.recipe=$recipe" 'ENTRYPOINT ["nats-server"]' >"$context/Dockerfile"
  say "making $nats_tag ($(nats-server --version))"
  DOCKER_BUILDKIT=0 docker build -q -t "$nats_tag" "$context" >/dev/null 2>"$context/log" || { cat "$context/log" >&2; die "cannot build $nats_tag"; }
  rm -rf "$context"
  docker run --rm --network none "$nats_tag" --version >/dev/null || die "$nats_tag does not run nats-server"
}

start_engine
docker compose version >/dev/null 2>&1 || install_packages docker-compose:docker-compose
[ "${1:-}" = --engine-only ] && { say "the engine answers"; exit 0; }
want=$(recipe)
current "$node_tag" "$want" || build_node_image "$want"
current "$nats_tag" "$want" || build_nats_image "$want"
say "ready: engine $(docker version --format '{{.Server.Version}}'), images $node_tag $nats_tag"
