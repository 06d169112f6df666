/**
 * Owns the cluster of a chaos run: real processes on a nats-server whose store outlives it, and the signs by which the
 * cluster shows that it has noticed a fault.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Child, type Cluster, ROOT_DIRECTORY, type ServiceSettings, startCluster } from '@lamina/cli';
import { ENDPOINTS, EVENTS } from '@lamina/protocol';
import { natsServerOf, processEnvironment, SETTINGS, type Service } from '@lamina/runtime';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import { ClusterLog } from './cluster-log.ts';
import type { Random } from './random.ts';
import { sleep } from './requests.ts';
import { Sign } from './sign.ts';

/** A process that somebody else has started, and that belongs to the cluster as long as it is among its guests. */
export interface Guest {
  readonly service: Service;
  readonly child: Child;
  /** Whether there is one more of the service because of it; else it has taken the place of one. */
  readonly isExtra: boolean;
}

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
const CHAOS_SETTINGS: ServiceSettings = {
  model: join(ROOT_DIRECTORY, 'models', 'lamina-tiny'),
  cacheDir: TEST_CACHE_DIRECTORY,
  kvDtype: 'f32',
  spreadAboveTokens: '32',
  denseWorkers: '1',
  maxRunningRequests: '8',
  // Any free one, for the gateways too that take the place of others.
  httpPort: '0',
};
const WHOLE_TIMEOUT_MS = 30_000;
/** More than the full disk has: it is the disk that refuses then, not a limit of the server. */
const MAX_STORE_BYTES = 8 * 1024 ** 3;

const numberOf = (service: Service): number => LAYOUT.find(([each]) => each === service)?.[1] ?? 0;

export class ChaosCluster {
  readonly cluster: Cluster;
  readonly storeDir: string;
  readonly log: ClusterLog;
  readonly guests = new Set<Guest>();
  readonly #ownsStore: boolean;
  readonly #settings: ServiceSettings;
  #nats: NatsServer;

  private constructor(
    cluster: Cluster,
    nats: NatsServer,
    storeDir: string,
    ownsStore: boolean,
    settings: ServiceSettings,
    log: ClusterLog,
  ) {
    this.cluster = cluster;
    this.#nats = nats;
    this.storeDir = storeDir;
    this.#ownsStore = ownsStore;
    this.#settings = settings;
    this.log = log;
  }

  static async start(options: ChaosClusterOptions = {}): Promise<ChaosCluster> {
    const storeDir = options.storeDir ?? mkdtempSync(join(tmpdir(), 'lamina-chaos-'));
    const environment = processEnvironment();
    const binary = natsServerOf(environment);
    const nats = await startNatsServer({ storeDir, binary, maxStoreBytes: MAX_STORE_BYTES });
    const log = new ClusterLog();
    const settings = { ...CHAOS_SETTINGS, ...options.settings };
    const cluster = await startCluster({
      attentionShards: numberOf('attention-shard'),
      denseExecutors: numberOf('dense-executor'),
      natsPort: 0,
      httpPort: 0,
      natsUrl: nats.url,
      natsServer: binary,
      environment: Object.fromEntries(Object.entries(environment).filter(([name]) => !name.startsWith('LAMINA_'))),
      settings,
      onExit: () => undefined,
      onLine: (name, line) => log.hear(name, line),
    });
    return new ChaosCluster(cluster, nats, storeDir, options.storeDir === undefined, settings, log);
  }

  get natsPort(): number {
    return this.#nats.port;
  }

  get natsPid(): number | undefined {
    return this.#nats.pid;
  }

  logs(): string {
    return this.log.text;
  }

  /** Variables of a process that is to belong to the cluster, with these settings over those of the others. */
  environmentOf(settings: ServiceSettings): Readonly<Record<string, string | undefined>> {
    const given: Readonly<Record<string, string | undefined>> = { ...this.#settings, ...settings };
    const variables = Object.entries(SETTINGS).map(([name, { env }]) => [env, given[name]]);
    return { PATH: processEnvironment().PATH, ...Object.fromEntries(variables) };
  }

  /** The running processes of a service, guests included. */
  running(service: Service): Child[] {
    const guests = [...this.guests].filter((guest) => guest.service === service).map(({ child }) => child);
    return [...this.cluster.processes(service), ...guests].filter((child) => child.isRunning);
  }

  /** Where the gateways that run serve HTTP. */
  gatewayUrls(): string[] {
    return this.running('gateway').flatMap(({ name }) => this.log.urlOf(name) ?? []);
  }

  /** A running process of a service. */
  victim(service: Service, random: Random): Child {
    return random.pick(this.cluster.processes(service).filter((child) => child.isRunning));
  }

  /** That some process logs a line with this text. */
  logged(text: string): Sign {
    return new Sign((see) =>
      this.log.watch((line) => {
        if (line.includes(text)) see();
      }),
    );
  }

  /** That the kv-manager says that a shard is lost: one of these, or any. */
  shardLost(isMeant: (shardId: string) => boolean = () => true): Sign {
    return new Sign((see) => {
      const subscription = this.cluster.bus.onEvent(EVENTS.shardLost, ({ shardId }) => {
        if (isMeant(shardId)) see();
      });
      return () => subscription.unsubscribe();
    });
  }

  /** That this process's own connection is cut. */
  disconnected(): Sign {
    return new Sign((see) => {
      this.cluster.bus.onStatus((type) => {
        if (type === 'disconnect') see();
      });
    });
  }

  /** Whether JetStream answers in time. */
  async hasJetStream(timeoutMs: number): Promise<boolean> {
    const manager = await this.cluster.bus.connection.jetstreamManager({ timeout: timeoutMs, checkAPI: false });
    return manager.getAccountInfo().then(
      () => true,
      () => false,
    );
  }

  /** How many processes of a service belong to the cluster. */
  #sizeOf(service: Service): number {
    return numberOf(service) + [...this.guests].filter((guest) => guest.isExtra && guest.service === service).length;
  }

  /** Services of which not as many processes run as were started. */
  incomplete(): string[] {
    return LAYOUT.flatMap(([service]) => {
      const [numRunning, number] = [this.running(service).length, this.#sizeOf(service)];
      return numRunning === number ? [] : [`${numRunning} of ${number} ${service} run`];
    });
  }

  /**
   * Resolves when everything runs and every shard that runs, and no other, has blocks to give.
   * @throws Error when that is not so in time: then something did not come back from a fault.
   */
  async whole(): Promise<void> {
    const deadlineMs = performance.now() + WHOLE_TIMEOUT_MS;
    for (;;) {
      const problems = [...this.incomplete(), ...(await this.#unregistered())];
      if (problems.length === 0) return;
      if (performance.now() > deadlineMs) throw new Error(`the cluster did not come back: ${problems.join(', ')}`);
      await sleep(100);
    }
  }

  async #unregistered(): Promise<string[]> {
    const status = this.cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1_000 });
    const problem = status.then(
      ({ shards, executors }) => {
        const numShards = shards.filter(({ numBlocks }) => numBlocks > 0).length;
        const isWhole =
          numShards === this.#sizeOf('attention-shard') && executors.length === this.#sizeOf('dense-executor');
        return isWhole ? [] : [`the kv-manager has ${numShards} shards and ${executors.length} executors`];
      },
      (cause: unknown) => [String(cause)],
    );
    return problem;
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
    await Promise.all([this.#add('kv-manager'), this.#add('dense-executor'), this.#add('gateway')]);
    await this.#add('attention-shard');
  }

  /** As many processes of a service as belong to the cluster. */
  async #add(service: Service): Promise<void> {
    await Promise.all(Array.from({ length: numberOf(service) }, () => this.cluster.add(service)));
  }

  async stop(): Promise<void> {
    await this.cluster.stop();
    await this.#nats.stop();
    if (this.#ownsStore) rmSync(this.storeDir, { recursive: true, force: true });
  }
}
