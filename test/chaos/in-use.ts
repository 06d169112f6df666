/**
 * Owns waiting until a process holds something of requests that run: whoever kills it before takes nothing from anybody.
 * What it holds is asked of the processes themselves and of the queue.
 */
import { ACK_WAIT_MS } from '@lamina/bus';
import type { Child, Cluster } from '@lamina/cli';
import { ENDPOINTS, SERVICE_NAMES, STREAMS, SUBJECTS, unpackMessage } from '@lamina/protocol';
import type { Service } from '@lamina/runtime';
import { sleep } from './requests.ts';

const POLL_MS = 50;
const DISCOVERY_MS = 200;
const REQUEST_TIMEOUT_MS = 2_000;
/** Some redeliveries long: what the process before held is first taken up by others. */
const TIMEOUT_MS = 8 * ACK_WAIT_MS;

type Problem = (cluster: Cluster, child: Child) => Promise<string | undefined>;

const PROBLEMS: Readonly<Partial<Record<Service, Problem>>> = {
  gateway: unusedGateway,
  'dense-executor': unusedExecutor,
  'attention-shard': unusedShard,
};

/**
 * Resolves when the process holds work: a gateway relays answers; a dense-executor runs requests, and so do the others all
 * those that the queue has given out (so what is taken up later was its own); an attention-shard holds blocks. Others at once.
 * @throws Error when that is not so in time.
 */
export async function inUse(cluster: Cluster, service: Service, child: Child): Promise<void> {
  const problemOf = PROBLEMS[service];
  if (problemOf === undefined) return;
  const deadlineMs = performance.now() + TIMEOUT_MS;
  for (;;) {
    const problem = await problemOf(cluster, child).catch(String);
    if (problem === undefined) return;
    if (performance.now() > deadlineMs)
      throw new Error(`${child.name} is not in use after ${TIMEOUT_MS} ms: ${problem}`);
    await sleep(POLL_MS);
  }
}

/** The $SRV ids and the names that the running processes of a service have, by process id. */
async function instancesOf(cluster: Cluster, service: Service): Promise<Map<number, { id: string; name: string }>> {
  const found = await cluster.bus.serviceStats(SERVICE_NAMES[service], DISCOVERY_MS);
  return new Map(found.map(({ id, metadata }) => [Number(metadata.pid), { id, name: String(metadata.instance) }]));
}

/** What a process says about itself at this moment. */
async function statusOf(cluster: Cluster, id: string): Promise<Record<string, unknown>> {
  const options = { timeout: REQUEST_TIMEOUT_MS };
  const { data } = await cluster.bus.connection.request(SUBJECTS.status(id), undefined, options);
  return Object(unpackMessage(data));
}

async function unusedGateway(cluster: Cluster, child: Child): Promise<string | undefined> {
  const instance = (await instancesOf(cluster, 'gateway')).get(child.pid ?? 0);
  if (instance === undefined) return 'it does not answer $SRV.STATS';
  const { openRequests } = await statusOf(cluster, instance.id);
  return Number(openRequests) > 0 ? undefined : 'it relays no answer';
}

async function unusedExecutor(cluster: Cluster, child: Child): Promise<string | undefined> {
  const instances = await instancesOf(cluster, 'dense-executor');
  const { connection } = cluster.bus;
  const manager = await connection.jetstreamManager({ timeout: REQUEST_TIMEOUT_MS, checkAPI: false });
  const numGivenOut = async (): Promise<number> =>
    (await manager.consumers.info(STREAMS.work.name, STREAMS.work.durableConsumer)).num_ack_pending;
  const numRunning = async (process: Child): Promise<number> => {
    const instance = instances.get(process.pid ?? 0);
    if (instance === undefined) throw new Error(`${process.name} does not answer $SRV.STATS`);
    const { runningRequests } = await statusOf(cluster, instance.id);
    return Number(runningRequests);
  };
  const others = cluster.processes('dense-executor').filter((process) => process.isRunning && process !== child);
  const before = await numGivenOut();
  const [own, ...theirs] = await Promise.all([child, ...others].map(numRunning));
  const after = await numGivenOut();
  const isSettled = before === after && after === theirs.reduce((sum, each) => sum + each, own!);
  if (own! > 0 && isSettled) return undefined;
  return `it runs ${own}, the others ${theirs.join(', ')} of ${before}, then ${after} requests`;
}

async function unusedShard(cluster: Cluster, child: Child): Promise<string | undefined> {
  const instance = (await instancesOf(cluster, 'attention-shard')).get(child.pid ?? 0);
  if (instance === undefined) return 'it does not answer $SRV.STATS';
  const { shards } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: REQUEST_TIMEOUT_MS });
  // Every life but its first has a number behind the name.
  const own = shards.find(({ shardId }) => shardId === instance.name || shardId.startsWith(`${instance.name}-`));
  return own !== undefined && own.usedBlocks > 0 ? undefined : 'it holds no block of a request';
}
