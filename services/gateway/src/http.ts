/**
 * Owns the HTTP server: /health and /metrics. The OpenAI API (/v1/...) and the dashboard (/) are to be registered in
 * `createHttpServer` as plugins of their own.
 *
 * Invariants
 * 1. Every reply but /metrics is JSON, errors included.
 * 2. /health asks the cluster each time; 200 means that a prompt would be answered.
 */
import { ERROR_CODES, LaminaError } from '@lamina/tensor';
import { type FastifyInstance, fastify } from 'fastify';
import type { ClusterState } from './cluster-view.ts';

export interface HttpParts {
  readonly modelId: string;
  readonly clusterState: () => Promise<ClusterState>;
  /** Prometheus text of the whole cluster. */
  readonly metrics: () => Promise<string>;
}

export function createHttpServer(parts: HttpParts): FastifyInstance {
  const server = fastify({ logger: false, forceCloseConnections: true });
  server.get('/health', async (_, reply) => {
    const state = await parts.clusterState();
    if (state.status === 'unavailable') {
      return reply.code(ERROR_CODES.unavailable.httpStatus).send({ status: 'unavailable', reason: state.reason });
    }
    const { status, executors, shards, freeBlocks } = state;
    return { status, model: parts.modelId, executors, shards, freeBlocks };
  });
  server.get('/metrics', async (_, reply) =>
    reply.type('text/plain; version=0.0.4; charset=utf-8').send(await parts.metrics()),
  );
  server.setNotFoundHandler((request, reply) =>
    reply
      .code(404)
      .send({ error: { code: 'invalid_request', message: `nothing is served at ${request.method} ${request.url}` } }),
  );
  server.setErrorHandler((cause, _, reply) => {
    const status = cause instanceof LaminaError ? cause.httpStatus : statusOf(cause);
    const code = cause instanceof LaminaError ? cause.code : status < 500 ? 'invalid_request' : 'internal';
    const message =
      status < 500 && cause instanceof Error ? cause.message : 'internal error; see the log of the gateway';
    return reply.code(status).send({ error: { code, message } });
  });
  return server;
}

function statusOf(cause: unknown): number {
  const isHttpError = typeof cause === 'object' && cause !== null && 'statusCode' in cause;
  return isHttpError && typeof cause.statusCode === 'number' ? cause.statusCode : 500;
}

/**
 * Listens and returns the port really used (`port` 0 takes any free one).
 * @throws LaminaError `address_in_use`, `config_invalid`
 */
export async function listen(server: FastifyInstance, host: string, port: number): Promise<number> {
  try {
    await server.listen({ host, port });
  } catch (cause) {
    const code = cause instanceof Error && 'code' in cause ? cause.code : undefined;
    if (code === 'EADDRINUSE') {
      throw new LaminaError(
        'address_in_use',
        `port ${port} on ${host} is taken; end what listens there or set --http-port (LAMINA_HTTP_PORT) to another, 0 for any free one`,
        { cause },
      );
    }
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new LaminaError(
      'config_invalid',
      `HTTP cannot listen on ${host}:${port} (${reason}); set --http-host (LAMINA_HTTP_HOST) and --http-port (LAMINA_HTTP_PORT)`,
      { cause },
    );
  }
  const address = server.server.address();
  return typeof address === 'object' && address !== null ? address.port : port;
}
