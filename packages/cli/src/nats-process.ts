/**
 * Owns starting a nats-server with JetStream for a local cluster.
 *
 * Invariants
 * 1. It listens on the loopback address only, and is started with port -1 where any free port will do: no race for one.
 * 2. Every service has a user of its own with a new random password; what connects without one is a client and no more.
 * 3. It is ready when its ports file is there, which it writes once it listens.
 */
import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join, relative } from 'node:path';
import { LaminaError } from '@lamina/tensor';
import { Child, type ChildOptions } from './child.ts';
import { writeNatsUsers } from './nats-users.ts';

export interface NatsProcessOptions extends Pick<ChildOptions, 'environment' | 'onLine'> {
  /** Path or name of the binary. */
  readonly binary: string;
  /** 0 = any free port. */
  readonly port: number;
  /** For its configuration, ports file, streams and the passwords of its users (`users/`); must exist. */
  readonly directory: string;
  readonly onSpawn: (child: Child) => void;
}

const LOOPBACK = '127.0.0.1';
/**
 * Of a message that passes through it, Go's runtime would wake a second core to look for more work, which the processes of the
 * cluster need. A variable GOMAXPROCS of the environment comes before it.
 */
const NUM_CORES = '1';
const START_TIMEOUT_MS = 10_000;
const POLL_MS = 20;

function configurationOf(port: number, directory: string, usersFile: string): string {
  return [
    `host: "${LOOPBACK}"`,
    `port: ${port === 0 ? -1 : port}`,
    `include ${JSON.stringify(relative(directory, usersFile))}`,
    `ports_file_dir: ${JSON.stringify(join(directory, 'ports'))}`,
    'max_payload: 8MB',
    // Why so much: deploy/nats.conf.
    'max_pending: 32MB',
    'write_deadline: "10s"',
    'jetstream {',
    `  store_dir: ${JSON.stringify(join(directory, 'streams'))}`,
    '  max_memory_store: 256MB',
    '  max_file_store: 4GB',
    '}',
    '',
  ].join('\n');
}

export interface RunningNats {
  readonly url: string;
  /** Directory with `<user>/password`. */
  readonly passwords: string;
}

/** Starts the server. @throws LaminaError `nats_unreachable` */
export async function startNats(options: NatsProcessOptions): Promise<RunningNats> {
  const { directory } = options;
  const portsDirectory = join(directory, 'ports');
  const configuration = join(directory, 'nats.conf');
  await mkdir(portsDirectory, { recursive: true });
  const passwords = join(directory, 'users');
  const usersFile = await writeNatsUsers(passwords, { clients: [], anonymous: 'durable-client' });
  await writeFile(configuration, configurationOf(options.port, directory, usersFile));
  const child = new Child({
    name: 'nats-server',
    command: options.binary,
    args: ['-c', configuration],
    environment: { GOMAXPROCS: NUM_CORES, ...options.environment },
    onLine: options.onLine,
  });
  options.onSpawn(child);
  const deadlineMs = performance.now() + START_TIMEOUT_MS;
  while (child.isRunning && performance.now() < deadlineMs) {
    const url = await readPorts(portsDirectory);
    if (url !== undefined) return { url, passwords };
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  if (!child.isRunning) {
    const { cause } = await child.ended;
    const isMissing = cause instanceof Error && 'code' in cause && cause.code === 'ENOENT';
    const reason = isMissing ? `${options.binary} was not found` : (child.log.at(-1) ?? 'it ended at once');
    throw new LaminaError(
      'nats_unreachable',
      `nats-server did not start: ${reason}; set LAMINA_NATS_SERVER to its path, or give --nats-url of one that runs`,
      { cause },
    );
  }
  throw new LaminaError('nats_unreachable', `nats-server did not listen within ${START_TIMEOUT_MS} ms`);
}

/** The server writes `{"nats": ["nats://127.0.0.1:4222"]}`. */
async function readPorts(directory: string): Promise<string | undefined> {
  const [file] = await readdir(directory);
  if (file === undefined) return undefined;
  return /nats:\/\/[^"]+/.exec(await readFile(join(directory, file), 'utf8'))?.[0];
}

/** @throws LaminaError `address_in_use` when something listens on the port. */
export async function requireFreePort(port: number, purpose: string, flag: string): Promise<void> {
  if (port === 0) return;
  const server = createServer();
  try {
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen({ host: LOOPBACK, port, exclusive: true }, resolve);
    });
  } catch (cause) {
    const isTaken = cause instanceof Error && 'code' in cause && cause.code === 'EADDRINUSE';
    const reason = isTaken ? 'is taken' : `cannot be used (${cause instanceof Error ? cause.message : String(cause)})`;
    throw new LaminaError(
      'address_in_use',
      `port ${port} for ${purpose} ${reason}; end what listens there or give ${flag} another, 0 for any free one`,
      { cause },
    );
  } finally {
    server.close();
  }
}
