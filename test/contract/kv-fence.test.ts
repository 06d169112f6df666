/**
 * An executor that is cut off with messages on their way, on a real nats-server, kv-manager and attention-shard: its
 * blocks are somebody else's when they arrive.
 */
import type { Bus } from '@lamina/bus';
import { ENDPOINTS, FRAME_KIND, unpackMessage } from '@lamina/protocol';
import { type AttentionSpec, blockBytes } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { FakeExecutor, plansOf } from './fake-executor.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const SPEC: AttentionSpec = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.2 };
const BLOCK = 16;
const HEARTBEAT_MS = 50;
const HEARTBEAT_TIMEOUT_MS = 300;
const TIMEOUT = { timeoutMs: 1000 };

let nats: NatsServer;
let bus: Bus;
let services: InProcessService[];
let executors: FakeExecutor[];

function fakeExecutor(executorId: string, originId: number): FakeExecutor {
  const executor = new FakeExecutor(bus, { modelId: 'm', spec: SPEC, blockSizeTokens: BLOCK }, executorId, originId);
  executors.push(executor);
  return executor;
}

beforeAll(async () => {
  nats = await startNatsServer();
});
afterAll(() => nats.stop());
beforeEach(async () => {
  bus = await connect(nats.url);
  executors = [];
  const beat = ['--heartbeat-interval-ms', String(HEARTBEAT_MS)];
  const timeout = ['--heartbeat-timeout-ms', String(HEARTBEAT_TIMEOUT_MS)];
  const manager = await startInProcess('kv-manager', startKvManager, nats.url, [
    '--kv-dtype',
    'f32',
    ...beat,
    ...timeout,
  ]);
  const budget = ['--kv-budget-bytes', String(blockBytes({ ...SPEC, blockSizeTokens: BLOCK, kvDtype: 'f32' }))];
  services = [await startInProcess('attention-shard', startAttentionShard, nats.url, budget), manager];
});
afterEach(async () => {
  for (const executor of executors) executor.cutOff();
  for (const service of services) await service.stop();
  await bus.close();
});

test.each(['a layer', 'a plan and its layer'])(
  "%s of an executor that was lost changes nobody else's KV",
  async (late) => {
    const lost = fakeExecutor('lost', 1);
    await lost.beat();
    const block = await lost.allocateSoon();
    const { prefill, decode } = plansOf(block, BLOCK);
    if (late === 'a layer') lost.sendPlan(block, 1, prefill);
    lost.keepBeating(HEARTBEAT_MS);
    const heir = fakeExecutor('heir', 2);
    await heir.beat();
    heir.keepBeating(HEARTBEAT_MS);
    lost.cutOff();
    expect(await heir.allocateSoon()).toEqual(block);
    await heir.run(block, 1, prefill, 0.1);
    const before = await heir.run(block, 2, decode, 0.2);
    // What sat in the socket arrives.
    if (late !== 'a layer') lost.sendPlan(block, 1, prefill);
    lost.sendLayer(block, 1, prefill, 0.3);
    // One step of the heir's that comes after it, and one that begins when the late layer has certainly been through.
    await heir.run(block, 3, decode, 0.2);
    expect(await heir.run(block, 4, decode, 0.2)).toEqual(before);
    lost.answers.length = 0;
    lost.sendPlan(block, 2, prefill);
    const { header, body } = await eventually(() => lost.answers[0]);
    expect(header.kind).toBe(FRAME_KIND.failure);
    expect(unpackMessage(body)).toMatchObject({ code: 'unavailable' });
  },
);

test('the blocks of an executor that was lost are free a heartbeat later, again and again', async () => {
  const heir = fakeExecutor('heir', 2);
  await heir.beat();
  heir.keepBeating(HEARTBEAT_MS);
  const waitsMs: number[] = [];
  for (let round = 0; round < 5; round++) {
    const lost = fakeExecutor(`lost${round}`, 10 + round);
    await lost.beat();
    await lost.allocateSoon();
    await eventually(async () => {
      const { executors } = await bus.request(ENDPOINTS.kvStatus, {}, TIMEOUT);
      return executors.length === 1 ? true : undefined;
    });
    const lostAtMs = performance.now();
    await heir.allocateSoon();
    waitsMs.push(performance.now() - lostAtMs);
    await bus.request(ENDPOINTS.free, { requestId: 'heir', executorId: 'heir' }, TIMEOUT);
  }
  waitsMs.sort((a, b) => a - b);
  console.log(`free after ${waitsMs.map(Math.round).join(', ')} ms, with a heartbeat every ${HEARTBEAT_MS} ms`);
  // Not the silence of a shard that does not confirm.
  expect(waitsMs[2]).toBeLessThan(HEARTBEAT_TIMEOUT_MS);
});
