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
import { ENDPOINTS } from '@lamina/protocol';
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

export class IsolatedShard {
  readonly #child: Child;
  readonly #proxy: TensorProxy;

  private constructor(child: Child, proxy: TensorProxy) {
    this.#child = child;
    this.#proxy = proxy;
  }

  /** Resolves when its blocks can be used. */
  static async start(cluster: Cluster, natsPort: number): Promise<IsolatedShard> {
    if (!connectNamespace()) throw new Error('the network namespace cannot be made');
    const proxy = await TensorProxy.start({
      ...{ serverPort: natsPort, host: HOST_ADDRESS },
      ...{ random: new Random(0), harms: [], rate: 0 },
    });
    const numShards = async (): Promise<number> => {
      const { shards } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
      return shards.filter(({ numBlocks }) => numBlocks > 0).length;
    };
    const before = await numShards();
    const child = new Child({
      name: 'isolated attention-shard',
      command: 'ip',
      args: [
        ...['netns', 'exec', NAMESPACE, process.execPath],
        join(ROOT_DIRECTORY, 'services', 'attention-shard', 'dist', 'main.js'),
      ],
      environment: { PATH: processEnvironment().PATH, LAMINA_NATS_URL: proxy.url },
    });
    for (let waitedMs = 0; (await numShards()) === before; waitedMs += 100) {
      if (waitedMs > 20_000) throw new Error(`the isolated shard did not join: ${child.log.join('\n')}`);
      await sleep(100);
    }
    return new IsolatedShard(child, proxy);
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
