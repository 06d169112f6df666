/**
 * Owns the HTTP server: /health and /metrics, errors, CORS. The OpenAI API is in ./http; the dashboard (/) is to be
 * registered as a plugin of its own.
 *
 * Invariants
 * 1. Every reply but /metrics and event streams is JSON, errors included.
 * 2. Nothing is received for what is not served or not let in, nor for a preflight: the answer comes when the headers are
 *    there.
 * 3. /health asks the cluster each time; 200 means that a prompt would be answered.
 * 4. At most `maxConnections` connections are open; one more is closed at once.
 */
import { ERROR_CODES, LaminaError } from '@lamina/tensor';
import { type FastifyInstance, type FastifyReply, type FastifyRequest, fastify } from 'fastify';
import type { ClusterState } from './cluster-view.ts';
import { httpErrorOf, openAiError, retryAfterMsOf } from './http/openai-error.ts';
import { type ApiParts, REQUEST_ID_HEADER, registerOpenAi } from './http/openai-routes.ts';
import { registerRequests } from './http/request-routes.ts';
import { shared } from './http/shared.ts';

export interface HttpParts extends ApiParts {
  readonly clusterState: () => Promise<ClusterState>;
  /** Prometheus text of the whole cluster. */
  readonly metrics: () => Promise<string>;
  readonly bodyLimitBytes: number;
  /** Pages of this origin may call the API from a browser; `*` = of any, undefined = of none. */
  readonly corsOrigin: string | undefined;
  readonly maxConnections: number;
  /** An error that the client is not told, and the route of its request. */
  readonly onError: (error: LaminaError, route: string) => void;
}

/** How long a client may take to send its request. */
const RECEIVE_TIMEOUT_MS = 30_000;
/** Every service is asked for its metrics and all are rendered: who asks within this time is given the same. */
const METRICS_MAX_AGE_MS = 1_000;

export function createHttpServer(parts: HttpParts): FastifyInstance {
  const server = fastify({
    logger: false,
    forceCloseConnections: true,
    bodyLimit: parts.bodyLimitBytes,
    requestTimeout: RECEIVE_TIMEOUT_MS,
    routerOptions: { maxParamLength: 256 },
  });
  server.server.maxConnections = parts.maxConnections;
  allowOrigin(server, parts.corsOrigin);
  server.addHook('onRequest', async (request, reply) => {
    if (!request.is404) return;
    const error = new LaminaError('invalid_request', `nothing is served at ${request.method} ${request.url}`);
    return reply.code(404).send(openAiError(error, 404));
  });
  server.get('/health', async (_, reply) => {
    const state = await parts.clusterState();
    if (state.status === 'unavailable') {
      return reply.code(ERROR_CODES.unavailable.httpStatus).send({ status: 'unavailable', reason: state.reason });
    }
    const { status, executors, shards, freeBlocks } = state;
    return { status, model: parts.modelId, executors, shards, freeBlocks };
  });
  const metrics = shared(parts.metrics, METRICS_MAX_AGE_MS);
  server.get('/metrics', async (_, reply) =>
    reply.type('text/plain; version=0.0.4; charset=utf-8').send(await metrics()),
  );
  registerOpenAi(server, parts);
  registerRequests(server, parts);
  server.setErrorHandler((cause, request, reply) => {
    const { error, status } = httpErrorOf(cause);
    if (error.code === 'internal') parts.onError(error, `${request.method} ${request.routeOptions.url}`);
    const retryAfterMs = retryAfterMsOf(error);
    if (retryAfterMs !== undefined) reply.header('Retry-After', Math.ceil(retryAfterMs / 1000));
    return reply.code(status).send(openAiError(error, status));
  });
  return server;
}

function allowOrigin(server: FastifyInstance, origin: string | undefined): void {
  if (origin === undefined) return;
  server.addHook('onRequest', async (request, reply) => {
    if (origin !== '*' && request.headers.origin !== origin) return;
    reply.header('Access-Control-Allow-Origin', origin);
    reply.header('Access-Control-Expose-Headers', `${REQUEST_ID_HEADER}, Retry-After`);
    if (origin !== '*') reply.header('Vary', 'Origin');
  });
  const preflight = async (_: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> =>
    reply
      .header('Access-Control-Allow-Methods', 'GET, POST, DELETE')
      .header('Access-Control-Allow-Headers', 'Authorization, Content-Type, Idempotency-Key, Last-Event-ID')
      .header('Access-Control-Max-Age', 600)
      .code(204)
      .send();
  // A browser asks without a key, so nobody is let in here: it is answered in the hook, before a body would be received.
  server.options('/v1/*', { onRequest: preflight }, preflight);
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
