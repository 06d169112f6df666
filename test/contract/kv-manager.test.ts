/** The kv-manager and real attention-shards over a real nats-server. */
import type { Bus } from '@lamina/bus';
import { ENDPOINTS, EVENTS, type KvStatus, SERVICE_NAMES, SUBJECTS } from '@lamina/protocol';
import { type AttentionSpec, blockBytes } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const SPEC: AttentionSpec = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.25 };
const BLOCK_BYTES = blockBytes({ ...SPEC, blockSizeTokens: 16, kvDtype: 'f16' });
const FAST = ['--heartbeat-interval-ms', '50', '--heartbeat-timeout-ms', '300', '--spread-above-tokens', '32'];
const TIMEOUT = { timeoutMs: 1000 };

let nats: NatsServer;
let bus: Bus;
let services: InProcessService[];
let beats: NodeJS.Timeout | undefined;

beforeAll(async () => {
  nats = await startNatsServer();
});
afterAll(() => nats.stop());
beforeEach(async () => {
  services = [];
  bus = await connect(nats.url);
});
afterEach(async () => {
  clearInterval(beats);
  await Promise.all(services.filter(({ context }) => !context.bus.isClosed).map((service) => service.stop()));
  await bus.close();
});

async function startManager(flags = FAST): Promise<InProcessService> {
  const manager = await startInProcess('kv-manager', startKvManager, nats.url, flags);
  services.push(manager);
  return manager;
}

async function startShard(numBlocks: number): Promise<InProcessService> {
  const flags = ['--kv-budget-bytes', String(numBlocks * BLOCK_BYTES), '--attention-kernel', 'portable'];
  const shard = await startInProcess('attention-shard', startAttentionShard, nats.url, flags);
  services.push(shard);
  return shard;
}

function beat(executorId = 'e1', spec = SPEC, modelId = 'tiny') {
  return bus.request(ENDPOINTS.executorHeartbeat, { executorId, modelId, spec, originIds: [1] }, TIMEOUT);
}

/** Registers an executor and keeps it alive. */
async function executor(): Promise<void> {
  await beat();
  beats = setInterval(() => void beat().catch(() => {}), 50);
}

function status(): Promise<KvStatus> {
  return bus.request(ENDPOINTS.kvStatus, {}, TIMEOUT);
}

async function readyShards(count: number): Promise<KvStatus['shards']> {
  return eventually(async () => {
    const ready = (await status()).shards.filter((shard) => shard.numBlocks > 0);
    return ready.length === count ? ready : undefined;
  });
}

function allocate(requestId: string, numTokens: number, maxTokens = numTokens) {
  return bus.request(
    ENDPOINTS.allocate,
    { requestId, executorId: 'e1', numTokens, maxTokens, deliveryCount: 1 },
    TIMEOUT,
  );
}

test('a shard that is there first gets its layout when an executor comes, and a late one the next block', async () => {
  await startManager();
  const first = await startShard(20);
  await executor();
  await readyShards(1);
  const { blocks } = await allocate('a', 100, 320);
  expect(new Set(blocks.map((ref) => ref.shardId))).toEqual(new Set([first.context.instanceId]));
  const late = await startShard(20);
  await readyShards(2);
  const extended = await bus.request(
    ENDPOINTS.extend,
    { requestId: 'a', executorId: 'e1', numBlocks: blocks.length, numTokens: blocks.length * 16 + 1 },
    TIMEOUT,
  );
  expect(extended.blocks.map((ref) => ref.shardId)).toEqual([late.context.instanceId]);
  const stats = await eventually(async () => {
    const all = await bus.serviceStats(SERVICE_NAMES['attention-shard'], 200);
    return all.some(({ data }) => JSON.stringify(data).includes('"blocksUsed":7')) ? all : undefined;
  });
  expect(stats).toHaveLength(2);
  await bus.request(ENDPOINTS.trim, { requestId: 'a', executorId: 'e1', numFreedBlocks: 3 }, TIMEOUT);
  expect((await status()).shards.map((shard) => shard.usedBlocks)).toEqual([4, 1]);
  await bus.request(ENDPOINTS.free, { requestId: 'a', executorId: 'e1' }, TIMEOUT);
  expect((await status()).shards.map((shard) => shard.usedBlocks)).toEqual([0, 0]);
});

test('shards start before the kv-manager, and find one that starts again', async () => {
  await startShard(8);
  const manager = await startManager();
  await executor();
  const [before] = await readyShards(1);
  await allocate('a', 16);
  await manager.crash();
  await startManager();
  const [after] = await readyShards(1);
  // Block tables of the former kv-manager name a shard id that is no more.
  expect(after!.shardId).not.toBe(before!.shardId);
  expect(after!.usedBlocks).toBe(0);
});

test('a shard that dies is announced when its heartbeats are missed, one that stops at once', async () => {
  await startManager();
  const shards = [await startShard(8), await startShard(8)];
  await executor();
  await readyShards(2);
  const lost: string[] = [];
  bus.onEvent(EVENTS.shardLost, ({ shardId }) => lost.push(shardId));
  await bus.flush();
  const { blocks } = await allocate('a', 8 * 16, 8 * 16);
  expect(new Set(blocks.map((ref) => ref.shardId)).size).toBe(2);
  const diedAtMs = performance.now();
  await shards[0]!.crash();
  await eventually(() => (lost.length === 1 ? true : undefined));
  expect(performance.now() - diedAtMs).toBeGreaterThan(200);
  expect(lost).toEqual([shards[0]!.context.instanceId]);
  expect((await beat()).voidRequestIds).toEqual(['a']);
  await expect(allocate('b', 16 * 9)).rejects.toMatchObject({ code: 'kv_capacity_exceeded' });
  expect((await allocate('a', 16 * 8)).blocks).toHaveLength(8);
  await shards[1]!.stop();
  await eventually(() => (lost.length === 2 ? true : undefined), 200);
  await expect(allocate('a', 16)).rejects.toMatchObject({ code: 'unavailable' });
});

test('nobody is lost when nats-server itself was away for longer than the time-out', async () => {
  const first = await startNatsServer();
  const flags = ['--heartbeat-interval-ms', '100', '--heartbeat-timeout-ms', '1000'];
  const manager = await startInProcess('kv-manager', startKvManager, first.url, flags);
  const shardFlags = ['--attention-kernel', 'portable', '--kv-budget-bytes', String(8 * BLOCK_BYTES)];
  const shard = await startInProcess('attention-shard', startAttentionShard, first.url, shardFlags);
  services.push(manager, shard);
  const own = await connect(first.url);
  const beating = { executorId: 'e1', modelId: 'tiny', spec: SPEC, originIds: [1] };
  await own.request(ENDPOINTS.executorHeartbeat, beating, TIMEOUT);
  const shards = async (): Promise<KvStatus['shards']> => (await own.request(ENDPOINTS.kvStatus, {}, TIMEOUT)).shards;
  await eventually(async () => ((await shards())[0]?.numBlocks === 8 ? true : undefined));
  const before = await shards();
  await first.stop();
  await new Promise((resolve) => setTimeout(resolve, 1300));
  const second = await startNatsServer({ port: first.port });
  await new Promise((resolve) => setTimeout(resolve, 600));
  expect(await eventually(() => shards().catch(() => undefined))).toEqual(before);
  await own.close();
  await Promise.all([manager.stop(), shard.stop()]);
  await second.stop();
});

test('a refusal is answered with its code, and room is announced', async () => {
  const manager = await startManager();
  await startShard(4);
  await executor();
  await readyShards(1);
  const freed: number[] = [];
  bus.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => freed.push(freeBlocks));
  await bus.flush();
  await allocate('a', 48);
  await expect(allocate('b', 32)).rejects.toMatchObject({ code: 'overloaded' });
  await expect(beat('e2', { ...SPEC, numLayers: 3 }, 'big')).rejects.toMatchObject({ code: 'invalid_request' });
  await bus.request(ENDPOINTS.free, { requestId: 'a', executorId: 'e1' }, TIMEOUT);
  await eventually(() => (freed.length > 0 ? true : undefined));
  expect(freed).toEqual([4]);
  const metrics = await manager.context.registry.metrics();
  expect(metrics).toContain('lamina_kv_refused_total{code="overloaded"} 1');
  expect(metrics).toMatch(/lamina_kv_blocks_total\{shard="shard-[0-9a-f]+"\} 4/);
  expect(metrics).toMatch(/lamina_kv_blocks_used_peak\{shard="shard-[0-9a-f]+"\} 3/);
});

test('another model after the last executor gives every shard another layout', async () => {
  await startManager();
  const shard = await startShard(8);
  await beat();
  await readyShards(1);
  await eventually(async () => ((await status()).executors.length === 0 ? true : undefined));
  await beat('e2', { ...SPEC, numLayers: 4 }, 'deeper');
  const [ready] = await readyShards(1);
  expect(ready).toMatchObject({ shardId: `${shard.context.instanceId}-1`, numBlocks: 4 });
});

test('a budget that holds no block ends the shard with the bytes that one needs', async () => {
  await startManager();
  await executor();
  const flags = ['--kv-budget-bytes', '100', '--attention-kernel', 'portable'];
  const shard = await startInProcess('attention-shard', startAttentionShard, nats.url, flags);
  services.push(shard);
  expect(shard.failures).toMatchObject([
    { code: 'config_invalid', message: expect.stringContaining(`${BLOCK_BYTES} bytes`) },
  ]);
});

test('a time-out below two intervals is refused at start', async () => {
  const flags = ['--heartbeat-interval-ms', '1000', '--heartbeat-timeout-ms', '1500'];
  await expect(startInProcess('kv-manager', startKvManager, nats.url, flags)).rejects.toMatchObject({
    code: 'config_invalid',
  });
});

test('a shard that an executor suspects is asked at once, and lost only if it does not answer', async () => {
  // Heartbeats would take a minute to find it.
  await startManager(['--heartbeat-interval-ms', '50', '--heartbeat-timeout-ms', '60000']);
  await executor();
  await startShard(20);
  const aliveId = (await readyShards(1))[0]!.shardId;
  const dead = await startShard(20);
  const deadId = (await readyShards(2)).find(({ shardId }) => shardId !== aliveId)!.shardId;
  const lost: string[] = [];
  bus.onEvent(EVENTS.shardLost, ({ shardId }) => lost.push(shardId));
  const suspect = (shardId: string) => bus.request(ENDPOINTS.suspectShard, { shardId }, TIMEOUT);
  expect(await suspect(aliveId)).toEqual({ isLost: false });
  expect(await suspect(deadId)).toEqual({ isLost: false });
  await dead.crash();
  const startedMs = performance.now();
  // Nobody listens: known without a time-out.
  expect(await Promise.all([suspect(deadId), suspect(deadId)])).toEqual([{ isLost: true }, { isLost: true }]);
  expect(performance.now() - startedMs).toBeLessThan(400);
  expect(await suspect(aliveId)).toEqual({ isLost: false });
  expect(await suspect(deadId)).toEqual({ isLost: true });
  await eventually(() => (lost.length > 0 ? true : undefined));
  expect(lost).toEqual([deadId]);
  expect((await status()).shards.map(({ shardId }) => shardId)).toEqual([aliveId]);
});

test('a suspected shard that listens and does not answer is lost', async () => {
  await startManager(['--heartbeat-interval-ms', '50', '--heartbeat-timeout-ms', '60000']);
  await executor();
  const silent = { shardId: 'silent', budgetBytes: 10 * BLOCK_BYTES, kernel: 'none', fencedUpTo: 0 };
  await bus.request(ENDPOINTS.shardHeartbeat, { ...silent, numBlocks: null }, TIMEOUT);
  await bus.request(ENDPOINTS.shardHeartbeat, { ...silent, numBlocks: 10 }, TIMEOUT);
  let numProbes = 0;
  const listening = bus.subscribe(SUBJECTS.shardProbe('silent'), () => numProbes++);
  expect(await bus.request(ENDPOINTS.suspectShard, { shardId: 'silent' }, TIMEOUT)).toEqual({ isLost: true });
  expect(numProbes).toBe(2);
  expect((await status()).shards).toEqual([]);
  listening.unsubscribe();
});
