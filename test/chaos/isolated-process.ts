/**
 * Owns a process of a chaos cluster in a network namespace of its own, whose only way to the others is a pair of virtual links
 * that can be taken down: packets are then lost without a word, as when a cable is pulled.
 *
 * Invariants
 * 1. Only addresses of 10.213.7.0/30 are used, and everything made here is removed by `stop`.
 * 2. What is sent to the namespace while the link is down goes nowhere: not to whoever has that address elsewhere.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { Child, ROOT_DIRECTORY } from '@lamina/cli';
import { SERVICE_NAMES } from '@lamina/protocol';
import type { Service } from '@lamina/runtime';
import type { ChaosCluster, Guest } from './chaos-cluster.ts';
import { Random } from './random.ts';
import { sleep } from './requests.ts';
import { TensorProxy } from './tensor-proxy.ts';

const NAMESPACE = 'lamina-chaos';
const HOST_LINK = 'lamina-host';
const OWN_LINK = 'lamina-own';
const HOST_ADDRESS = '10.213.7.1';
const OWN_ADDRESS = '10.213.7.2';
const NOWHERE = ['unreachable', `${OWN_ADDRESS}/32`];

const ip = (...args: string[]): boolean => spawnSync('ip', args).status === 0;

/** Makes the namespace and its links; false where this process may not. */
function connectNamespace(): boolean {
  return (
    ip('netns', 'add', NAMESPACE) &&
    ip('link', 'add', HOST_LINK, 'type', 'veth', 'peer', 'name', OWN_LINK) &&
    ip('link', 'set', OWN_LINK, 'netns', NAMESPACE) &&
    ip('addr', 'add', `${HOST_ADDRESS}/30`, 'dev', HOST_LINK) &&
    ip('link', 'set', HOST_LINK, 'up') &&
    ip('-n', NAMESPACE, 'addr', 'add', `${OWN_ADDRESS}/30`, 'dev', OWN_LINK) &&
    ip('-n', NAMESPACE, 'link', 'set', OWN_LINK, 'up') &&
    ip('-n', NAMESPACE, 'link', 'set', 'lo', 'up')
  );
}

function removeNamespace(): void {
  ip('route', 'del', ...NOWHERE);
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
const DISCOVERY_MS = 200;
const POLL_MS = 50;
const STOP_GRACE_MS = 5_000;

/** There may be one only: the isolated one takes its place. */
const SINGLE: Service = 'kv-manager';

export class IsolatedProcess {
  readonly child: Child;
  readonly #tested: ChaosCluster;
  readonly #guest: Guest;
  readonly #proxy: TensorProxy;
  #instance = '';

  private constructor(tested: ChaosCluster, service: Service, proxy: TensorProxy) {
    const name = `isolated ${service}`;
    this.#tested = tested;
    this.#proxy = proxy;
    this.child = new Child({
      name,
      command: 'ip',
      args: [
        ...['netns', 'exec', NAMESPACE, process.execPath],
        join(ROOT_DIRECTORY, 'services', service, 'dist', 'main.js'),
      ],
      environment: tested.environmentOf({ natsUrl: proxy.url, httpHost: OWN_ADDRESS }),
      // Nobody waits for its own words: what others say shows whether it is missed.
      onLine: (_, line) => tested.log.keep(name, line),
    });
    this.#guest = { service, child: this.child, isExtra: service !== SINGLE };
  }

  /** Resolves when it is in use as one more of its service, or in the place of the only one. */
  static async start(tested: ChaosCluster, service: Service): Promise<IsolatedProcess> {
    if (!connectNamespace()) throw new Error('the network namespace cannot be made');
    const proxy = await TensorProxy.start({
      ...{ serverPort: tested.natsPort, host: HOST_ADDRESS },
      ...{ random: new Random(0), harms: [], rate: 0 },
    });
    if (service === SINGLE) await Promise.all(tested.running(service).map((only) => only.stop(STOP_GRACE_MS)));
    const isolated = new IsolatedProcess(tested, service, proxy);
    try {
      await isolated.#join();
      return isolated;
    } catch (cause) {
      await isolated.stop();
      throw cause;
    }
  }

  async #join(): Promise<void> {
    const { service } = this.#guest;
    for (const deadlineMs = performance.now() + JOIN_TIMEOUT_MS; performance.now() < deadlineMs; await sleep(POLL_MS)) {
      const instances = await this.#tested.cluster.bus.serviceStats(SERVICE_NAMES[service], DISCOVERY_MS);
      const own = instances.find(({ metadata }) => metadata.pid === String(this.child.pid));
      if (own === undefined) continue;
      this.#instance = String(own.metadata.instance);
      this.#tested.guests.add(this.#guest);
      return this.#tested.whole();
    }
    throw new Error(`the isolated ${service} did not join: ${this.child.log.join('\n')}`);
  }

  /** Whether this is the id of it, a shard; each life of a shard but the first has a number behind that. */
  isOwnShardId(shardId: string): boolean {
    return shardId === this.#instance || shardId.startsWith(`${this.#instance}-`);
  }

  cut(): void {
    ip('route', 'add', ...NOWHERE);
    ip('link', 'set', HOST_LINK, 'down');
  }

  heal(): void {
    ip('link', 'set', HOST_LINK, 'up');
    ip('route', 'del', ...NOWHERE);
  }

  /** Ends it; if it had taken a place, another is in that place then. */
  async stop(): Promise<void> {
    this.#tested.guests.delete(this.#guest);
    await this.child.stop(STOP_GRACE_MS);
    await this.#proxy.stop();
    removeNamespace();
    const { service, isExtra } = this.#guest;
    if (!isExtra) await this.#tested.cluster.add(service);
  }
}
