/**
 * Owns which shard the next block of a request goes to.
 *
 * Why so. A decode step is as slow as its slowest shard, and a shard's time in a step is the KV that it reads: for all
 * running requests together, its used blocks. Evening the used share therefore evens the work of a batch and the memory
 * at once, and sends new blocks to a shard that has just joined. A long request that runs alone is only as fast as the
 * shard with most of *its* blocks, so among shards that are about equally full its own count decides. "About" is a
 * sixteenth of the memory: a finer comparison would let a few blocks of other requests undo the balance of this one.
 * The first tokens stay on one shard, because a short request split over shards pays one message per shard and layer
 * for no bandwidth worth having.
 *
 * Invariants
 * 1. Placement never fails while any pool has a free block.
 * 2. A pool that was added a moment ago is a candidate for the next block.
 */
import type { BlockPool, BlockTable } from './block-table.ts';

/** Used shares within one such step count as equal. */
const USED_SHARE_STEPS = 16;

/** Appends `numBlocks` blocks to `table`. The caller has checked that the pools have that many free. */
export function placeBlocks(
  table: BlockTable,
  numBlocks: number,
  pools: readonly BlockPool[],
  spreadAboveBlocks: number,
): void {
  const end = table.numHeld + numBlocks;
  while (table.numHeld < end) {
    const numHomeBlocks = Math.min(end, spreadAboveBlocks) - table.numHeld;
    const pool = numHomeBlocks > 0 ? homePool(table, numHomeBlocks, pools) : spreadPool(table, pools);
    const numAppended = numHomeBlocks > 0 ? Math.min(numHomeBlocks, pool.freeBlocks) : 1;
    for (let i = 0; i < numAppended; i++) table.append(pool);
  }
}

/** Where the first tokens go: on with the shard they are on, else the least used one that takes them all, else the least used one. */
function homePool(table: BlockTable, numHomeBlocks: number, pools: readonly BlockPool[]): BlockPool {
  const current = table.lastPool;
  if (current !== undefined && current.freeBlocks > 0) return current;
  let best: BlockPool | undefined;
  let bestTakesAll = false;
  for (const pool of pools) {
    if (pool.freeBlocks === 0) continue;
    const takesAll = pool.freeBlocks >= numHomeBlocks;
    if (best === undefined || (takesAll && !bestTakesAll)) {
      best = pool;
      bestTakesAll = takesAll;
    } else if (takesAll === bestTakesAll && pool.usedShare < best.usedShare) best = pool;
  }
  return best!;
}

/** The least used shard in steps of a sixteenth; among equals the one with fewest blocks of this request, then the least used. */
function spreadPool(table: BlockTable, pools: readonly BlockPool[]): BlockPool {
  let best: BlockPool | undefined;
  let bestStep = 0;
  let bestOwn = 0;
  for (const pool of pools) {
    if (pool.freeBlocks === 0) continue;
    const step = Math.floor(pool.usedShare * USED_SHARE_STEPS);
    const own = table.numBlocksOn(pool);
    const isBetter =
      best === undefined ||
      step < bestStep ||
      (step === bestStep && (own < bestOwn || (own === bestOwn && pool.usedShare < best.usedShare)));
    if (!isBetter) continue;
    best = pool;
    bestStep = step;
    bestOwn = own;
  }
  return best!;
}
