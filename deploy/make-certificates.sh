#!/bin/sh
# Owns certificates for development: an authority, and a certificate of nats-server that it signed. Needs openssl.
#
#   deploy/make-certificates.sh DIR [NAME...]
#
# NAMEs are the host names and addresses that nats-server is reached by; default: nats localhost 127.0.0.1 ::1.
# Written: DIR/ca.pem (LAMINA_NATS_TLS_CA_FILE of every process and client), DIR/server.pem and DIR/server-key.pem (the
# server's). Run again, it makes all of them new. The authority's key is not kept: it can sign nothing else.
set -eu
directory=${1:?usage: make-certificates.sh DIR [NAME...]}
shift
[ $# -gt 0 ] || set -- nats localhost 127.0.0.1 ::1
days=365

names=''
for name; do
  case $name in
    *[!A-Za-z0-9.:-]*) echo "make-certificates: \"$name\" is no host name and no address" >&2; exit 1 ;;
    *:*) kind=IP ;;
    *[!0-9.]*) kind=DNS ;;
    *) kind=IP ;;
  esac
  names="$names${names:+,}$kind:$name"
done

umask 077
mkdir -p "$directory"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days "$days" -subj '/CN=Lamina development CA' \
  -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' -addext 'keyUsage=critical,keyCertSign' \
  -keyout "$work/ca-key.pem" -out "$work/ca.pem" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -subj '/CN=nats-server' \
  -keyout "$work/server-key.pem" -out "$work/server.csr" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n' "$names" >"$work/extensions"
openssl x509 -req -sha256 -days "$days" -in "$work/server.csr" -CA "$work/ca.pem" -CAkey "$work/ca-key.pem" -CAcreateserial \
  -extfile "$work/extensions" -out "$work/server.pem" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
for file in ca.pem server.pem server-key.pem; do mv "$work/$file" "$directory/$file"; done
# The certificates are public; the server's key is not.
chmod 644 "$directory/ca.pem" "$directory/server.pem"
chmod 755 "$directory"
echo "$directory: ca.pem server.pem server-key.pem for $names"
