/**
 * Owns connecting to nats-server and turning its failures into our errors.
 *
 * Invariants
 * 1. The first connection is retried for `connectTimeoutMs` and then fails with one clear error.
 * 2. A connection that was once made is remade for ever; messages published meanwhile are buffered by the client.
 */
import { LaminaError } from '@lamina/tensor';
import { type ConnectionOptions, connect, type NatsConnection, NatsError } from 'nats';

export interface BusOptions {
  /** nats://[user:password@]host:port, comma-separated for several servers. */
  readonly url: string;
  /** Shown in the server's connection list. */
  readonly name: string;
  readonly connectTimeoutMs: number;
}

const RETRY_INTERVAL_MS = 250;

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
  };
  const deadlineMs = performance.now() + options.connectTimeoutMs;
  for (;;) {
    try {
      return await connect(connectionOptions);
    } catch (cause) {
      const mayRecover =
        cause instanceof NatsError && (cause.code === 'CONNECTION_REFUSED' || cause.code === 'TIMEOUT');
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
  return url.replace(/\/\/[^@/]*@/g, '//***@');
}
