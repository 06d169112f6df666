/**
 * Owns the cluster of a chaos run: real processes on a nats-server whose store outlives it, and the signs by which the
 * cluster shows that it has noticed a fault.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  type Child,
  type Cluster,
  natsServerOf,
  ROOT_DIRECTORY,
  type ServiceSettings,
  startCluster,
} from '@lamina/cli';
import { EVENTS } from '@lamina/protocol';
import { processEnvironment, type Service } from '@lamina/runtime';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import type { Random } from './random.ts';

export interface ChaosClusterOptions {
  /** Directory of JetStream's files; default: a temporary one. */
  readonly storeDir?: string;
  readonly settings?: ServiceSettings;
}

const LAYOUT: readonly (readonly [Service, number])[] = [
  ['kv-manager', 1],
  ['attention-shard', 3],
  ['dense-executor', 2],
  ['gateway', 1],
];
const SETTINGS: ServiceSettings = {
  model: join(ROOT_DIRECTORY, 'models', 'lamina-tiny'),
  cacheDir: TEST_CACHE_DIRECTORY,
  kvDtype: 'f32',
  spreadAboveTokens: '32',
  denseWorkers: '1',
  maxRunningRequests: '8',
};
const LOG_LINES = 600;
/** More than the full disk has: it is the disk that refuses then, not a limit of the server. */
const MAX_STORE_BYTES = 8 * 1024 ** 3;

const numberOf = (service: Service): number => LAYOUT.find(([each]) => each === service)?.[1] ?? 0;

export class ChaosCluster {
  readonly cluster: Cluster;
  readonly storeDir: string;
  readonly #ownsStore: boolean;
  readonly #lines: string[];
  readonly #watchers: Set<(line: string) => void>;
  #nats: NatsServer;

  private constructor(
    cluster: Cluster,
    nats: NatsServer,
    storeDir: string,
    ownsStore: boolean,
    lines: string[],
    watchers: Set<(line: string) => void>,
  ) {
    this.cluster = cluster;
    this.#nats = nats;
    this.storeDir = storeDir;
    this.#ownsStore = ownsStore;
    this.#lines = lines;
    this.#watchers = watchers;
  }

  static async start(options: ChaosClusterOptions = {}): Promise<ChaosCluster> {
    const storeDir = options.storeDir ?? mkdtempSync(join(tmpdir(), 'lamina-chaos-'));
    const environment = processEnvironment();
    const binary = natsServerOf(environment);
    const nats = await startNatsServer({ storeDir, binary, maxStoreBytes: MAX_STORE_BYTES });
    const lines: string[] = [];
    const watchers = new Set<(line: string) => void>();
    const cluster = await startCluster({
      attentionShards: numberOf('attention-shard'),
      denseExecutors: numberOf('dense-executor'),
      natsPort: 0,
      httpPort: 0,
      natsUrl: nats.url,
      natsServer: binary,
      environment: Object.fromEntries(Object.entries(environment).filter(([name]) => !name.startsWith('LAMINA_'))),
      settings: { ...SETTINGS, ...options.settings },
      onExit: () => undefined,
      onLine: (name, line) => {
        lines.push(`[${name}] ${line}`);
        if (lines.length > LOG_LINES) lines.shift();
        for (const watcher of watchers) watcher(line);
      },
    });
    return new ChaosCluster(cluster, nats, storeDir, options.storeDir === undefined, lines, watchers);
  }

  get natsPort(): number {
    return this.#nats.port;
  }

  get natsPid(): number | undefined {
    return this.#nats.pid;
  }

  logs(): string {
    return this.#lines.join('\n');
  }

  /** A running process of a service. */
  victim(service: Service, random: Random): Child {
    return random.pick(this.cluster.processes(service).filter((child) => child.isRunning));
  }

  /** When some process logs a line with this text: milliseconds from now; undefined if none does within `timeoutMs`. */
  logged(text: string, timeoutMs = 20_000): Promise<number | undefined> {
    const startedMs = performance.now();
    return new Promise((resolve) => {
      const end = (ms: number | undefined): void => {
        clearTimeout(timer);
        this.#watchers.delete(watcher);
        resolve(ms);
      };
      const watcher = (line: string): void => {
        if (line.includes(text)) end(performance.now() - startedMs);
      };
      const timer = setTimeout(() => end(undefined), timeoutMs);
      this.#watchers.add(watcher);
    });
  }

  /** When the kv-manager says that a shard is lost: milliseconds from now. */
  shardLost(timeoutMs = 20_000): Promise<number | undefined> {
    const startedMs = performance.now();
    return new Promise((resolve) => {
      const end = (ms: number | undefined): void => {
        clearTimeout(timer);
        subscription.unsubscribe();
        resolve(ms);
      };
      const subscription = this.cluster.bus.onEvent(EVENTS.shardLost, () => end(performance.now() - startedMs));
      const timer = setTimeout(() => end(undefined), timeoutMs);
    });
  }

  /** When this process's own connection is cut: milliseconds from now. */
  disconnected(): Promise<number | undefined> {
    const startedMs = performance.now();
    return new Promise((resolve) => {
      this.cluster.bus.onStatus((type) => {
        if (type === 'disconnect') resolve(performance.now() - startedMs);
      });
    });
  }

  killNats(): Promise<void> {
    return this.#nats.kill();
  }

  async startNats(): Promise<void> {
    const { port } = this.#nats;
    const binary = natsServerOf(processEnvironment());
    this.#nats = await startNatsServer({ storeDir: this.storeDir, port, binary, maxStoreBytes: MAX_STORE_BYTES });
  }

  /** Kills every process, nats-server too, as a power cut does. */
  async killAll(): Promise<void> {
    for (const [service] of LAYOUT)
      for (const child of this.cluster.processes(service)) if (child.isRunning) child.kill('SIGKILL');
    await this.killNats();
  }

  async startAll(): Promise<void> {
    await this.startNats();
    // A shard counts as added when the kv-manager gives it blocks, and that needs an executor.
    for (const [service, number] of LAYOUT)
      if (service !== 'attention-shard') for (let count = 0; count < number; count++) await this.cluster.add(service);
    for (let count = 0; count < numberOf('attention-shard'); count++) await this.cluster.add('attention-shard');
  }

  async stop(): Promise<void> {
    await this.cluster.stop();
    await this.#nats.stop();
    if (this.#ownsStore) rmSync(this.storeDir, { recursive: true, force: true });
  }
}
