/**
 * Owns connecting to nats-server and turning its failures into our errors.
 *
 * Invariants
 * 1. The first connection is retried for `connectTimeoutMs` and then fails with one clear error.
 * 2. A connection that was once made is remade for ever, with its subscriptions. What was published meanwhile may be
 *    lost (nats.js empties its buffer at each attempt): whoever must be heard waits for an answer and tries again.
 */
import { LaminaError } from '@lamina/tensor';
import { type ConnectionOptions, connect, type NatsConnection } from 'nats';

export interface BusOptions {
  /** nats://[user:password@]host:port, comma-separated for several servers. */
  readonly url: string;
  /** Shown in the server's connection list. */
  readonly name: string;
  readonly connectTimeoutMs: number;
}

const RETRY_INTERVAL_MS = 250;
/** Failures that may pass: a server that starts, restarts, or whose name is not known yet (a container that starts). */
const PASSING_CODES = new Set([
  'CONNECTION_REFUSED',
  'CONNECTION_CLOSED',
  'DISCONNECT',
  'TIMEOUT',
  'ENOTFOUND',
  'EAI_AGAIN',
  'ECONNRESET',
  'EPIPE',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ETIMEDOUT',
]);

/** @throws LaminaError `nats_unreachable` */
export async function connectToNats(options: BusOptions): Promise<NatsConnection> {
  const connectionOptions: ConnectionOptions = {
    servers: options.url.split(',').map((server) => server.trim()),
    name: options.name,
    maxReconnectAttempts: -1,
    reconnectTimeWait: RETRY_INTERVAL_MS,
    reconnectJitter: RETRY_INTERVAL_MS,
    timeout: 5_000,
    pingInterval: 20_000,
    // A stack trace for every request would be one for every token.
    noAsyncTraces: true,
  };
  const deadlineMs = performance.now() + options.connectTimeoutMs;
  for (;;) {
    try {
      return await connect(connectionOptions);
    } catch (cause) {
      const mayRecover =
        cause instanceof Error && 'code' in cause && typeof cause.code === 'string' && PASSING_CODES.has(cause.code);
      if (!mayRecover || performance.now() > deadlineMs) throw unreachable(options.url, cause);
      await new Promise((resolve) => setTimeout(resolve, RETRY_INTERVAL_MS));
    }
  }
}

function unreachable(url: string, cause: unknown): LaminaError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new LaminaError(
    'nats_unreachable',
    `no nats-server answers at ${redactUrl(url)} (${reason}); start one with "nats-server -js" or set LAMINA_NATS_URL`,
    { cause },
  );
}

/** The URL without its password, for logs and messages. */
export function redactUrl(url: string): string {
  return url
    .split(',')
    .map((server) => server.replace(/^(\s*(?:[a-z]+:\/\/)?).*@/i, '$1***@'))
    .join(',');
}
