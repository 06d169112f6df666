/**
 * The connection of an executor's worker is cut while the executor itself is not, and what it sent is not lost but late: on a
 * real nats-server, kv-manager, attention-shard and executor. Its blocks are somebody else's when it arrives.
 */
import { join } from 'node:path';
import { type Bus, WorkQueue } from '@lamina/bus';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { readModel } from '@lamina/model';
import { ENDPOINTS, SUBJECTS } from '@lamina/protocol';
import { blockBytes } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import { workItem } from './bus-bench.ts';
import { FakeExecutor, type FakeModel, plansOf } from './fake-executor.ts';
import { HoldingProxy } from './holding-proxy.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
const BLOCK = 64;
const TENSORS = 'PUB lamina.v1.tensor.shard.';

let nats: NatsServer;
let model: FakeModel;
let bus: Bus;
let proxy: HoldingProxy;
let heir: FakeExecutor;
let services: InProcessService[];

beforeAll(async () => {
  nats = await startNatsServer();
  const { modelId, attention } = await readModel(MODEL);
  model = { modelId, spec: attention, blockSizeTokens: BLOCK };
});
afterAll(() => nats.stop());
beforeEach(async () => {
  bus = await connect(nats.url);
  proxy = await HoldingProxy.start(nats.url);
  const managerFlags = ['--kv-dtype', 'f32', '--block-size-tokens', String(BLOCK), '--heartbeat-interval-ms', '100'];
  const budget = blockBytes({ ...model.spec, blockSizeTokens: BLOCK, kvDtype: 'f32' });
  const executorFlags = ['--nats-url', proxy.url, '--model', MODEL, '--cache-dir', TEST_CACHE_DIRECTORY];
  const manager = await startInProcess('kv-manager', startKvManager, nats.url, managerFlags);
  const shard = await startInProcess('attention-shard', startAttentionShard, nats.url, [
    '--kv-budget-bytes',
    String(budget),
  ]);
  const executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, executorFlags);
  services = [executor, shard, manager];
  heir = new FakeExecutor(bus, model, 'heir', 1);
  await heir.beat();
  heir.keepBeating(100);
});
afterEach(async () => {
  heir.cutOff();
  for (const service of services) await service.stop();
  await proxy.stop();
  await bus.close();
});

const usedBlocks = async (): Promise<number> =>
  (await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 })).shards.reduce(
    (sum, each) => sum + each.usedBlocks,
    0,
  );

test.each([
  ['a layer', 1],
  ['a plan and its layer', 0],
])("%s that was in the closed socket of a worker changes nobody else's KV", async (_, numToPass) => {
  proxy.hold(/worker/, TENSORS, numToPass);
  const id = `cut-${numToPass}`;
  const tokenIds = Array.from({ length: 40 }, (_, i) => 5 + i);
  await new WorkQueue(bus).submit({ ...workItem(id, { tokenIds, maxTokens: 8 }), model: model.modelId });
  // The layer of the prefill, which has the K and V of the whole prompt.
  await eventually(() => (proxy.numHeld(TENSORS) >= 2 - numToPass ? true : undefined));
  bus.publish(SUBJECTS.cancel(id), new Uint8Array(0));
  await bus.flush();
  await new Promise((resolve) => setTimeout(resolve, 100));
  expect(await usedBlocks()).toBe(1);
  proxy.cut();
  const block = await heir.allocateSoon();
  const { prefill, decode } = plansOf(block, BLOCK);
  await heir.run(block, 1, prefill, 0.1);
  const before = await heir.run(block, 2, decode, 0.2);
  proxy.release();
  await new Promise((resolve) => setTimeout(resolve, 100));
  await heir.run(block, 3, decode, 0.2);
  const after = await heir.run(block, 4, decode, 0.2);
  expect(Buffer.compare(after, before)).toBe(0);
});
