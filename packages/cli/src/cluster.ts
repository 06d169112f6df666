/**
 * Owns a local cluster: nats-server (unless one is given) and the service processes, from start to stop.
 *
 * Invariants
 * 1. `startCluster` resolves when a prompt would be answered by everything that was asked for, or rejects with nothing left.
 * 2. A child that ends before it was told to is a failure of the cluster, reported once.
 * 3. `stop` ends the children in the order gateway, executors, shards and kv-manager, nats-server, and removes what was
 *    written; it may be called at any time and more than once.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Bus } from '@lamina/bus';
import { ENDPOINTS, SERVICE_NAMES } from '@lamina/protocol';
import { natsAccessOf, readConfig, SETTINGS, type Service, type SettingName } from '@lamina/runtime';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { Child } from './child.ts';
import { readHealth } from './health.ts';
import { Janitor } from './janitor.ts';
import { type RunningNats, requireFreePort, startNats } from './nats-process.ts';
import { portOf } from './probes.ts';
import { ROOT_DIRECTORY } from './root.ts';

export type ServiceSettings = Readonly<Partial<Record<SettingName, string>>>;

export interface ClusterOptions {
  readonly attentionShards: number;
  readonly denseExecutors: number;
  /** 0 = any free port. */
  readonly natsPort: number;
  /** 0 = any free port. */
  readonly httpPort: number;
  /** A server that runs already, with the users that the settings name; none is started then. */
  readonly natsUrl?: string | undefined;
  /** Path or name of the nats-server binary. */
  readonly natsServer: string;
  /** What every child inherits. */
  readonly environment: Readonly<Record<string, string | undefined>>;
  /** Settings for all services, over the environment. */
  readonly settings: ServiceSettings;
  /** Called for a child that ended unasked; without it, `failure` resolves. */
  readonly onExit?: ((child: Child, error: LaminaError) => void) | undefined;
  readonly onLine?: ((name: string, line: string) => void) | undefined;
  /** Gives the start up. */
  readonly signal?: AbortSignal | undefined;
}

const READY_TIMEOUT_MS = 120_000;
const POLL_MS = 60;
const STOP_GRACE_MS: Readonly<Record<Service | 'nats-server', number>> = {
  gateway: 12_000,
  'dense-executor': 8_000,
  'attention-shard': 5_000,
  'kv-manager': 5_000,
  'nats-server': 5_000,
};
const STOP_ORDER: readonly (readonly (Service | 'nats-server')[])[] = [
  ['gateway'],
  ['dense-executor'],
  ['attention-shard', 'kv-manager'],
  ['nats-server'],
];

/** The server that is started here listens on the loopback address only, without TLS. */
const NO_TLS: ServiceSettings = { natsTlsCaFile: '', natsTlsCertificateFile: '', natsTlsKeyFile: '' };

export class Cluster {
  /** Resolves with the first failure of a child. */
  readonly failure: Promise<LaminaError>;
  readonly #options: ClusterOptions;
  readonly #children: { readonly kind: Service | 'nats-server'; readonly child: Child }[] = [];
  readonly #janitor = new Janitor();
  #onFailure: (error: LaminaError) => void = () => undefined;
  #directory: string | undefined;
  #bus: Bus | undefined;
  #natsUrl = '';
  #httpUrl = '';
  #passwords: string | undefined;
  #stopped: Promise<void> | undefined;

  constructor(options: ClusterOptions) {
    this.#options = options;
    this.failure = new Promise((resolve) => {
      this.#onFailure = resolve;
    });
  }

  get natsUrl(): string {
    return this.#natsUrl;
  }

  get httpUrl(): string {
    return this.#httpUrl;
  }

  /** Directory with the password of each service's NATS user; undefined on a server that was not started here. */
  get passwords(): string | undefined {
    return this.#passwords;
  }

  /** The operator's connection to the cluster. */
  get bus(): Bus {
    if (this.#bus === undefined) throw new LaminaError('internal', 'the cluster is not started');
    return this.#bus;
  }

  /** Processes of one service, those that ended included, in the order of their start. */
  processes(kind: Service | 'nats-server'): readonly Child[] {
    return this.#children.filter((entry) => entry.kind === kind).map(({ child }) => child);
  }

  /** Called once, by startCluster. */
  async start(): Promise<void> {
    const { natsPort, httpPort, attentionShards, denseExecutors } = this.#options;
    if (this.#options.natsUrl === undefined) await requireFreePort(natsPort, 'NATS', '--nats-port');
    await requireFreePort(httpPort, 'HTTP', '--http-port');
    const nats = this.#options.natsUrl === undefined ? await this.#startNats() : { url: this.#options.natsUrl };
    this.#natsUrl = nats.url;
    if ('passwords' in nats) this.#passwords = nats.passwords;
    const config = readConfig('gateway', [], this.#environmentOf('operator', {}));
    const access = natsAccessOf(config, 'operator');
    this.#bus = await Bus.connect(
      { url: this.#natsUrl, name: 'lamina launcher', connectTimeoutMs: 2_000, access },
      { onError: () => undefined },
    );
    if (this.#stopped !== undefined) return;
    this.#spawnService('kv-manager');
    for (let count = 0; count < denseExecutors; count++) this.#spawnService('dense-executor');
    for (let count = 0; count < attentionShards; count++) this.#spawnService('attention-shard');
    const gateway = this.#spawnService('gateway', { httpPort: String(httpPort) });
    await this.#waitUntilReady(gateway);
  }

  /** Starts one more process of a service. Resolves when it has announced itself, a shard when its blocks can be used. */
  async add(service: Service, settings: ServiceSettings = {}): Promise<Child> {
    const child = this.#spawnService(service, settings);
    await this.#poll(`${child.name} did not become ready`, async () => {
      if (!child.isRunning) throw await child.ended;
      const instances = await this.bus.serviceStats(SERVICE_NAMES[service], POLL_MS * 2);
      const instance = instances.find(({ metadata }) => metadata.pid === String(child.pid))?.metadata.instance;
      if (instance === undefined || service !== 'attention-shard') return instance;
      const { shards } = await this.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1_000 });
      return shards.find((shard) => shard.shardId === instance && shard.numBlocks > 0);
    });
    return child;
  }

  addShard(settings: ServiceSettings = {}): Promise<Child> {
    return this.add('attention-shard', settings);
  }

  stop(): Promise<void> {
    this.#stopped ??= this.#stop();
    return this.#stopped;
  }

  /** Ends everything at once. */
  async kill(): Promise<void> {
    for (const { child } of this.#children) if (child.isRunning) void child.stop(0);
    await this.stop();
  }

  async #stop(): Promise<void> {
    await this.#bus?.close().catch(() => undefined);
    for (const kinds of STOP_ORDER) {
      const group = this.#children.filter(({ kind }) => kinds.includes(kind));
      await Promise.all(group.map(({ kind, child }) => child.stop(STOP_GRACE_MS[kind])));
    }
    if (this.#directory !== undefined) await rm(this.#directory, { recursive: true, force: true, maxRetries: 3 });
    this.#janitor.done();
  }

  async #startNats(): Promise<RunningNats> {
    this.#directory = await mkdtemp(join(tmpdir(), 'lamina-'));
    this.#janitor.own(this.#directory);
    return startNats({
      binary: this.#options.natsServer,
      port: this.#options.natsPort,
      directory: this.#directory,
      environment: this.#options.environment,
      onLine: this.#options.onLine,
      onSpawn: (child) => this.#keep('nats-server', child),
    });
  }

  /** The variables of a process that connects as `user`, unless the settings name another. */
  #environmentOf(user: string, settings: ServiceSettings): Readonly<Record<string, string | undefined>> {
    const ownServer: ServiceSettings =
      this.#passwords === undefined ? {} : { natsUser: user, natsPasswordFile: this.#passwords, ...NO_TLS };
    const given: Readonly<Record<string, string | undefined>> = {
      ...ownServer,
      ...this.#options.settings,
      natsUrl: this.#natsUrl,
      ...settings,
    };
    const variables = Object.entries(SETTINGS).flatMap(([name, { env }]) =>
      given[name] === undefined ? [] : [[env, given[name]]],
    );
    return { ...this.#options.environment, ...Object.fromEntries(variables) };
  }

  #spawnService(service: Service, settings: ServiceSettings = {}): Child {
    const number = this.processes(service).length + 1;
    const child = new Child({
      name: number === 1 ? service : `${service} ${number}`,
      command: process.execPath,
      args: ['--enable-source-maps', join(ROOT_DIRECTORY, 'services', service, 'dist', 'main.js')],
      environment: this.#environmentOf(service, settings),
      onLine: this.#options.onLine,
    });
    this.#keep(service, child);
    return child;
  }

  #keep(kind: Service | 'nats-server', child: Child): void {
    this.#children.push({ kind, child });
    this.#janitor.watch(child.pid);
    void child.ended.then((error) => {
      this.#janitor.forget(child.pid);
      if (child.isStopping) return;
      if (this.#options.onExit === undefined) this.#onFailure(error);
      else this.#options.onExit(child, error);
    });
  }

  async #waitUntilReady(gateway: Child): Promise<void> {
    const { attentionShards, denseExecutors } = this.#options;
    let reason = 'the gateway does not answer';
    await this.#poll(
      () => `the cluster did not become ready: ${reason}`,
      async () => {
        const ended = this.#children.find(({ child }) => !child.isRunning && !child.isStopping);
        if (ended !== undefined) throw await ended.child.ended;
        if (this.#httpUrl === '') {
          const httpPort = await portOf(this.bus, gateway.pid, POLL_MS * 2);
          if (httpPort === undefined) return undefined;
          this.#httpUrl = `http://127.0.0.1:${httpPort}`;
        }
        const health = await readHealth(this.#httpUrl, 1_500);
        if (!health.isReady) reason = health.reason;
        else if (health.shards < attentionShards) reason = `${health.shards} of ${attentionShards} shards are ready`;
        else if (health.executors < denseExecutors) reason = `${health.executors} of ${denseExecutors} executors are`;
        else return health;
        return undefined;
      },
    );
  }

  /** Calls `probe` until it returns something. */
  async #poll(problem: string | (() => string), probe: () => Promise<unknown>): Promise<void> {
    const deadlineMs = performance.now() + READY_TIMEOUT_MS;
    while ((await probe()) === undefined) {
      this.#options.signal?.throwIfAborted();
      if (performance.now() > deadlineMs) {
        throw new LaminaError('unavailable', typeof problem === 'string' ? problem : problem());
      }
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }
}

/** @throws LaminaError of whatever kept the cluster from starting; nothing is left running then. */
export async function startCluster(options: ClusterOptions): Promise<Cluster> {
  const cluster = new Cluster(options);
  try {
    await cluster.start();
    return cluster;
  } catch (cause) {
    await cluster.stop();
    throw asLaminaError(cause);
  }
}
