/** A shard whose tensors are not heard has no memory to give, until they are. */
import { ENDPOINTS } from '@lamina/protocol';
import { type AttentionSpec, blockBytes } from '@lamina/tensor';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { expect, test } from 'vitest';
import { startAttentionShard } from '../../services/attention-shard/src/service.ts';
import { startKvManager } from '../../services/kv-manager/src/service.ts';
import { HoldingProxy } from './holding-proxy.ts';
import { connect, eventually, startInProcess } from './in-process.ts';

const SPEC: AttentionSpec = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.2 };
const BUDGET = String(8 * blockBytes({ ...SPEC, blockSizeTokens: 16, kvDtype: 'f16' }));
const TENSORS = /^attention-shard .* tensors$/;

test('a shard announces its memory when the server has the subscription of its tensors, and not before', async () => {
  const nats = await startNatsServer();
  const proxy = await HoldingProxy.start(nats.url);
  const bus = await connect(nats.url);
  const manager = await startInProcess('kv-manager', startKvManager, nats.url, ['--heartbeat-interval-ms', '50']);
  proxy.hold(TENSORS, 'SUB ', 0);
  const flags = ['--kv-budget-bytes', BUDGET];
  const first = { executorId: 'e1', modelId: 'm', spec: SPEC, originIds: [1] };
  await bus.request(ENDPOINTS.executorHeartbeat, first, { timeoutMs: 1000 });
  const shard = await startInProcess('attention-shard', startAttentionShard, proxy.url, flags);
  const announced = async (): Promise<number | undefined> => {
    const { shards } = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
    return shards.find(({ numBlocks }) => numBlocks === 8)?.numBlocks ?? undefined;
  };
  await eventually(() => (proxy.numHeld('SUB ') > 0 ? true : undefined));
  await new Promise((resolve) => setTimeout(resolve, 1_500));
  expect(await announced()).toBeUndefined();
  proxy.cut();
  expect(await eventually(announced)).toBe(8);
  await shard.stop();
  await manager.stop();
  await bus.close();
  await proxy.stop();
  await nats.stop();
}, 20_000);
