/** How much KV the gateway takes a cluster to have for one request. */
import type { KvStatus } from '@lamina/protocol';
import { expect, test } from 'vitest';
import { ClusterView } from '../src/cluster-view.ts';

function statusWith(windowTokens: readonly number[] | undefined): KvStatus {
  const spec = { numLayers: 2, numHeads: 1, numKvHeads: 1, headDim: 8, scale: 1, windowTokens };
  const shard = { kernel: 'portable', budgetBytes: 1, usedBlocks: 1, usedBlocksPeak: 1 };
  return {
    managerEpoch: 'e',
    modelId: 'm',
    layout: { ...spec, blockSizeTokens: 16, kvDtype: 'f32' },
    executors: [{ executorId: 'e1', modelId: 'm' }],
    shards: [
      { ...shard, shardId: 'a', numBlocks: 3 },
      { ...shard, shardId: 'b', numBlocks: 4 },
    ],
    numRequests: 1,
  };
}

test.each([
  [undefined, 7 * 16],
  [[64, 0], 7 * 16],
  [[64, 32], Number.POSITIVE_INFINITY],
])('windows %o: room for %d tokens', async (windowTokens, kvCapacityTokens) => {
  const view = new ClusterView({ request: () => Promise.resolve(statusWith(windowTokens)) }, 'm', 100);
  expect(await view.live()).toMatchObject({ status: 'ok', freeBlocks: 5, kvCapacityTokens });
});
