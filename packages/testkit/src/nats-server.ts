/**
 * Owns starting a real nats-server with JetStream for a test.
 *
 * Invariants
 * 1. It never outlives this process, nor does a store directory that was made here.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { natsServerOf, processEnvironment } from '@lamina/runtime';
import { LaminaError } from '@lamina/tensor';

export interface NatsServerOptions {
  /** Path of the binary; default: the one that this process was started with, else nats-server from PATH. */
  readonly binary?: string;
  /** Default: any free one. */
  readonly port?: number;
  /** Kept when given; default: a temporary one. */
  readonly storeDir?: string;
  /** What JetStream thinks that it may store, whatever the disk holds; default: its own guess. */
  readonly maxStoreBytes?: number;
  /** Largest message that the server takes; default 1 MiB. */
  readonly maxPayloadBytes?: number;
  /** Subjects that nobody may publish on. */
  readonly denyPublish?: readonly string[];
  /** More lines of its configuration: users, TLS. */
  readonly configuration?: string;
}

export interface NatsServer {
  readonly url: string;
  readonly port: number;
  readonly pid: number | undefined;
  /** Stops the server, killing one that does not end in time, and waits until it is gone. */
  stop(): Promise<void>;
  /** Ends it as a crash does; its store stays if `storeDir` was given. */
  kill(): Promise<void>;
}

const START_TIMEOUT_MS = 10_000;
/** A server whose disk is full may not end on SIGTERM at all (seen with 2.9.10). */
const STOP_GRACE_MS = 5_000;

/** @throws LaminaError `nats_unreachable` when the server does not start. */
export async function startNatsServer(options: NatsServerOptions = {}): Promise<NatsServer> {
  const workDir = mkdtempSync(join(tmpdir(), 'lamina-nats-'));
  const configPath = join(workDir, 'nats.conf');
  const storeLimit = options.maxStoreBytes === undefined ? '' : `, max_file_store: ${options.maxStoreBytes}`;
  writeFileSync(
    configPath,
    [
      'host: "127.0.0.1"',
      `port: ${options.port ?? -1}`,
      `max_payload: ${options.maxPayloadBytes ?? 1_048_576}`,
      ...(options.denyPublish === undefined
        ? []
        : [
            'authorization { users: [ { user: "all", password: "all", permissions: { publish: { deny: ' +
              `${JSON.stringify(options.denyPublish)} } } } ] }`,
            'no_auth_user: "all"',
          ]),
      `jetstream { store_dir: ${JSON.stringify(options.storeDir ?? join(workDir, 'store'))}${storeLimit} }`,
      options.configuration ?? '',
    ].join('\n'),
  );
  const child = spawn(options.binary ?? natsServerOf(processEnvironment()), ['-c', configPath], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  const cleanUp = (): void => {
    child.kill('SIGKILL');
    rmSync(workDir, { recursive: true, force: true });
  };
  process.once('exit', cleanUp);
  try {
    const port = await listeningPort(child);
    const end = async (signal: NodeJS.Signals): Promise<void> => {
      process.off('exit', cleanUp);
      if (child.exitCode === null && child.signalCode === null) {
        const exited = once(child, 'exit');
        child.kill(signal);
        const timer = setTimeout(() => child.kill('SIGKILL'), STOP_GRACE_MS);
        await exited;
        clearTimeout(timer);
      }
      rmSync(workDir, { recursive: true, force: true });
    };
    return {
      url: `nats://127.0.0.1:${port}`,
      port,
      pid: child.pid,
      stop: () => end('SIGTERM'),
      kill: () => end('SIGKILL'),
    };
  } catch (cause) {
    process.off('exit', cleanUp);
    cleanUp();
    throw cause;
  }
}

/** The port that the server logs, once it says that it is ready. */
function listeningPort(child: ChildProcess): Promise<number> {
  return new Promise((resolve, reject) => {
    let output = '';
    const fail = (reason: string): void => {
      clearTimeout(timer);
      reject(new LaminaError('nats_unreachable', `nats-server did not start: ${reason}`, { diagnostics: { output } }));
    };
    const timer = setTimeout(() => fail('it took too long'), START_TIMEOUT_MS);
    child.once('error', (error) => fail(error.message));
    child.once('exit', (code) => fail(`exit status ${code}; ${output.trim().split('\n').at(-1)}`));
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      if (output.length > 65_536) return;
      output += text;
      const port = /Listening for client connections on \S+:(\d+)/.exec(output)?.[1];
      if (port === undefined || !output.includes('Server is ready')) return;
      clearTimeout(timer);
      resolve(Number(port));
    });
  });
}
