# Owns: nats-server with Lamina's configuration and a store directory that a non-root user may write.
# NATS_IMAGE: any image with nats-server and a shell (health check: wget), such as nats:<version>-alpine.
ARG NATS_IMAGE=nats:2.12.15-alpine
FROM ${NATS_IMAGE}
LABEL lamina.stage=nats
COPY nats.conf /etc/nats/lamina.conf
USER root
# Alone the server takes nobody: compose mounts the users of its services over this token, which nobody knows.
RUN mkdir -p /data /etc/nats/users /etc/nats/tls \
 && printf 'authorization { token: "%s" }\n' "$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')" >/etc/nats/users/users.conf \
 && : >/etc/nats/tls/tls.conf \
 && chown -R 10001:10001 /data /etc/nats/users \
 && nats-server -c /etc/nats/lamina.conf -t
USER 10001:10001
EXPOSE 4222 8222
ENTRYPOINT ["nats-server", "-c", "/etc/nats/lamina.conf"]
CMD []
