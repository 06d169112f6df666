/**
 * Owns an attention-shard in a network namespace of its own, whose only way to nats-server is a pair of virtual links that
 * can be taken down: packets are then lost without a word, as when a cable is pulled.
 *
 * Invariants
 * 1. Only addresses of 10.213.7.0/30 are used, and everything made here is removed by `stop`.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { Child, type Cluster, ROOT_DIRECTORY } from '@lamina/cli';
import { ENDPOINTS, type KvStatus } from '@lamina/protocol';
import { processEnvironment } from '@lamina/runtime';
import { Random } from './random.ts';
import { TensorProxy } from './tensor-proxy.ts';
import { sleep } from './workload.ts';

const NAMESPACE = 'lamina-chaos';
const HOST_LINK = 'lamina-host';
const SHARD_LINK = 'lamina-shard';
const HOST_ADDRESS = '10.213.7.1';
const SHARD_ADDRESS = '10.213.7.2';

const ip = (...args: string[]): boolean => spawnSync('ip', args).status === 0;

/** Makes the namespace and its links; false where this process may not. */
function connectNamespace(): boolean {
  return (
    ip('netns', 'add', NAMESPACE) &&
    ip('link', 'add', HOST_LINK, 'type', 'veth', 'peer', 'name', SHARD_LINK) &&
    ip('link', 'set', SHARD_LINK, 'netns', NAMESPACE) &&
    ip('addr', 'add', `${HOST_ADDRESS}/30`, 'dev', HOST_LINK) &&
    ip('link', 'set', HOST_LINK, 'up') &&
    ip('-n', NAMESPACE, 'addr', 'add', `${SHARD_ADDRESS}/30`, 'dev', SHARD_LINK) &&
    ip('-n', NAMESPACE, 'link', 'set', SHARD_LINK, 'up') &&
    ip('-n', NAMESPACE, 'link', 'set', 'lo', 'up')
  );
}

function removeNamespace(): void {
  ip('link', 'del', HOST_LINK);
  ip('netns', 'del', NAMESPACE);
}

export function canPartition(): boolean {
  removeNamespace();
  const isPossible = connectNamespace();
  removeNamespace();
  return isPossible;
}

const JOIN_TIMEOUT_MS = 20_000;
/** Once healed, what TCP has left unsent is sent again within some seconds. */
const IN_USE_TIMEOUT_MS = 30_000;
const POLL_MS = 50;

const shardsOf = async (cluster: Cluster): Promise<KvStatus['shards']> => {
  const { shards } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
  return shards.filter(({ numBlocks }) => numBlocks > 0);
};

export class IsolatedShard {
  readonly #cluster: Cluster;
  readonly #child: Child;
  readonly #proxy: TensorProxy;
  /** Of its first life; every later one has a number behind it. */
  readonly #firstId: string;

  private constructor(cluster: Cluster, child: Child, proxy: TensorProxy, firstId: string) {
    this.#cluster = cluster;
    this.#child = child;
    this.#proxy = proxy;
    this.#firstId = firstId;
  }

  /** Resolves when its blocks can be used. */
  static async start(cluster: Cluster, natsPort: number): Promise<IsolatedShard> {
    if (!connectNamespace()) throw new Error('the network namespace cannot be made');
    const proxy = await TensorProxy.start({
      ...{ serverPort: natsPort, host: HOST_ADDRESS },
      ...{ random: new Random(0), harms: [], rate: 0 },
    });
    const others = new Set((await shardsOf(cluster)).map(({ shardId }) => shardId));
    const child = new Child({
      name: 'isolated attention-shard',
      command: 'ip',
      args: [
        ...['netns', 'exec', NAMESPACE, process.execPath],
        join(ROOT_DIRECTORY, 'services', 'attention-shard', 'dist', 'main.js'),
      ],
      environment: { PATH: processEnvironment().PATH, LAMINA_NATS_URL: proxy.url },
    });
    for (let waitedMs = 0; waitedMs < JOIN_TIMEOUT_MS; waitedMs += POLL_MS) {
      const joined = (await shardsOf(cluster)).find(({ shardId }) => !others.has(shardId));
      if (joined !== undefined) return new IsolatedShard(cluster, child, proxy, joined.shardId);
      await sleep(POLL_MS);
    }
    throw new Error(`the isolated shard did not join: ${child.log.join('\n')}`);
  }

  /** Whether this is the id of one of its lives. */
  isOwnId(shardId: string): boolean {
    return shardId === this.#firstId || shardId.startsWith(`${this.#firstId}-`);
  }

  /**
   * Resolves when it has joined, again after a cut, and holds KV of requests that run: cut off before, nobody would notice.
   * @throws Error when that is not so in time.
   */
  async inUse(): Promise<void> {
    const deadlineMs = performance.now() + IN_USE_TIMEOUT_MS;
    for (;;) {
      const own = (await shardsOf(this.#cluster)).find(({ shardId }) => this.isOwnId(shardId));
      if (own !== undefined && own.usedBlocks > 0) return;
      if (performance.now() > deadlineMs) {
        const state = own === undefined ? 'has not joined again' : 'holds no block of a request';
        throw new Error(`the isolated shard ${state} after ${IN_USE_TIMEOUT_MS} ms: ${this.#child.log.join('\n')}`);
      }
      await sleep(POLL_MS);
    }
  }

  cut(): void {
    ip('link', 'set', HOST_LINK, 'down');
  }

  heal(): void {
    ip('link', 'set', HOST_LINK, 'up');
  }

  async stop(): Promise<void> {
    await this.#child.stop(1_000);
    await this.#proxy.stop();
    removeNamespace();
  }
}
