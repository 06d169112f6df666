/**
 * Owns connecting to nats-server and turning its failures into our errors.
 *
 * Invariants
 * 1. The first connection is retried for `connectTimeoutMs` and then fails with one clear error.
 * 2. A connection that was once made is remade for ever, with its subscriptions. What was published meanwhile may be
 *    lost (nats.js empties its buffer at each attempt): whoever must be heard waits for an answer and tries again.
 * 3. Passwords are read from their files when a connection is made, and kept nowhere: what is passed around, and could be
 *    logged, is a path. A password that was changed on both sides needs no restart.
 */
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import {
  type ConnectionOptions,
  connect,
  ErrorCode,
  type NatsConnection,
  type TlsOptions,
  usernamePasswordAuthenticator,
} from 'nats';

/** As whom a process connects, and how it knows the server. Without a password file: as anybody. */
export interface NatsAccess {
  readonly user: string;
  /** File with the password, or a directory in which it is `<user>/password`. */
  readonly passwordFile?: string | undefined;
  /** PEM files; any of them, or an address that starts with tls://, makes TLS a must. */
  readonly tlsCaFile?: string | undefined;
  readonly tlsCertificateFile?: string | undefined;
  readonly tlsKeyFile?: string | undefined;
}

export interface BusOptions {
  /** nats://[user:password@]host:port or tls://..., comma-separated for several servers. */
  readonly url: string;
  /** Shown in the server's connection list. */
  readonly name: string;
  readonly connectTimeoutMs: number;
  readonly access?: NatsAccess | undefined;
}

export const RETRY_INTERVAL_MS = 250;
/**
 * A server that is gone without a word, its cable pulled or its machine stopped, is noticed 10 to 15 s later: when the timer finds two
 * pings unanswered. What was answered while this process's own loop stood still is read before the timer can come twice.
 */
export const PING_INTERVAL_MS = 5_000;
export const MAX_UNANSWERED_PINGS = 2;
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

/**
 * @param inboxPrefix Of the subjects on which its requests are answered; by default that of a connection without a user.
 * @throws LaminaError `nats_unreachable`
 */
export async function connectToNats(options: BusOptions, inboxPrefix: string | undefined): Promise<NatsConnection> {
  const connectionOptions: ConnectionOptions = {
    servers: serversOf(options.url),
    name: options.name,
    maxReconnectAttempts: -1,
    reconnectTimeWait: RETRY_INTERVAL_MS,
    reconnectJitter: RETRY_INTERVAL_MS,
    timeout: 5_000,
    pingInterval: PING_INTERVAL_MS,
    maxPingOut: MAX_UNANSWERED_PINGS,
    // A stack trace for every request would be one for every token.
    noAsyncTraces: true,
    // A server that restarts with other passwords refuses us until our file has ours.
    ignoreAuthErrorAbort: true,
    ...accessOptions(options),
    ...(inboxPrefix !== undefined && { inboxPrefix }),
  };
  const deadlineMs = performance.now() + options.connectTimeoutMs;
  for (;;) {
    try {
      return await connect(connectionOptions);
    } catch (cause) {
      const mayRecover =
        cause instanceof Error && 'code' in cause && typeof cause.code === 'string' && PASSING_CODES.has(cause.code);
      if (isRefusal(cause)) throw refused(options, cause);
      if (!mayRecover || performance.now() > deadlineMs) throw unreachable(options.url, cause);
      await new Promise((resolve) => setTimeout(resolve, RETRY_INTERVAL_MS));
    }
  }
}

/** @throws LaminaError `config_invalid` when a file cannot be read. */
function accessOptions({ url, access }: BusOptions): Partial<ConnectionOptions> {
  const options: Partial<ConnectionOptions> = {};
  if (access?.passwordFile !== undefined) {
    const { user, passwordFile } = access;
    readPassword(passwordFile, user);
    options.authenticator = usernamePasswordAuthenticator(user, () => readPassword(passwordFile, user));
  }
  const tls: TlsOptions = {
    ...(access?.tlsCaFile !== undefined && { caFile: readable(access.tlsCaFile) }),
    ...(access?.tlsCertificateFile !== undefined && { certFile: readable(access.tlsCertificateFile) }),
    ...(access?.tlsKeyFile !== undefined && { keyFile: readable(access.tlsKeyFile) }),
  };
  if (wantsTls({ url, access })) options.tls = tls;
  return options;
}

export function serversOf(url: string): string[] {
  return url.split(',').map((server) => server.trim());
}

export function wantsTls({ url, access }: Pick<BusOptions, 'url' | 'access'>): boolean {
  const files = [access?.tlsCaFile, access?.tlsCertificateFile, access?.tlsKeyFile];
  return files.some((file) => file !== undefined) || /(^|,)\s*tls:/.test(url);
}

/** @throws LaminaError `config_invalid` when the file cannot be read. */
export function readPassword(path: string, user: string): string {
  try {
    const file = statSync(path).isDirectory() ? join(path, user, 'password') : path;
    return readFileSync(file, 'utf8').trim();
  } catch (cause) {
    throw new LaminaError(
      'config_invalid',
      `the password of the NATS user "${user}" cannot be read: ${reasonOf(cause)}`,
      {
        cause,
      },
    );
  }
}

/** nats.js says only that TLS failed when it cannot read a file. */
function readable(path: string): string {
  try {
    readFileSync(path);
    return path;
  } catch (cause) {
    throw new LaminaError('config_invalid', `a file for TLS cannot be read: ${reasonOf(cause)}`, { cause });
  }
}

function reasonOf(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause);
}

const REFUSAL_CODES = new Set<string>([
  ErrorCode.AuthorizationViolation,
  ErrorCode.AuthenticationExpired,
  ErrorCode.AuthenticationTimeout,
  ErrorCode.BadAuthentication,
]);

function isRefusal(cause: unknown): boolean {
  return cause instanceof Error && 'code' in cause && typeof cause.code === 'string' && REFUSAL_CODES.has(cause.code);
}

export function refused({ url, access }: BusOptions, cause: unknown): LaminaError {
  const who = access?.passwordFile === undefined ? 'a process without a password' : `the user "${access.user}"`;
  return new LaminaError(
    'nats_unreachable',
    `nats-server at ${redactUrl(url)} refuses ${who}; set LAMINA_NATS_USER and LAMINA_NATS_PASSWORD_FILE to a user of it`,
    { cause },
  );
}

export function unreachable(url: string, cause: unknown): LaminaError {
  return new LaminaError(
    'nats_unreachable',
    `no nats-server answers at ${redactUrl(url)} (${reasonOf(cause)}); start one with "nats-server -js" or set LAMINA_NATS_URL`,
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
