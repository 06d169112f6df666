# Owns: nats-server with Lamina's configuration and a store directory that a non-root user may write.
# NATS_IMAGE: any image with nats-server and a shell (health check: wget), such as nats:<version>-alpine.
ARG NATS_IMAGE=nats:2.12.15-alpine
FROM ${NATS_IMAGE}
LABEL lamina.stage=nats
COPY nats.conf /etc/nats/lamina.conf
USER root
RUN mkdir -p /data && chown 10001:10001 /data && nats-server -c /etc/nats/lamina.conf -t
USER 10001:10001
EXPOSE 4222 8222
ENTRYPOINT ["nats-server", "-c", "/etc/nats/lamina.conf"]
CMD []
