/** Registration, tables, refusals and shards of the kv-manager's state machine. */
import { expect, test } from 'vitest';
import { BlockPool } from '../src/block-table.ts';
import { BLOCK, cluster, countByShard, Fixture, OTHER_SPEC, refusal } from './fixture.ts';

test('the first executor decides the layout; a shard gets it at its next heartbeat', () => {
  const fixture = new Fixture();
  expect(fixture.shard('s1', null)).toMatchObject({ layout: null, known: true, heartbeatIntervalMs: 250 });
  expect(fixture.executor('e1')).toMatchObject({ registration: 1, layout: { numLayers: 6, blockSizeTokens: 16 } });
  expect(fixture.executor('e1')).toMatchObject({ registration: 1 });
  expect(fixture.shard('s1', null)).toMatchObject({ layout: { kvDtype: 'f16' }, heartbeatIntervalMs: 1000 });
});

test('another model is refused while an executor of the first lives, by both names', () => {
  const fixture = cluster(10);
  const { code, message } = refusal(() => fixture.executor('e2', OTHER_SPEC, 'big'));
  expect(code).toBe('invalid_request');
  expect(message).toContain('serves tiny (6 layers');
  expect(message).toContain('not big (30 layers');
  expect(refusal(() => fixture.executor('e2', undefined, 'other-name')).code).toBe('invalid_request');
  expect(refusal(() => fixture.executor('e1', OTHER_SPEC, 'tiny')).code).toBe('invalid_request');
});

test('when the last executor is gone another model brings its layout, and shards must come anew', () => {
  const fixture = cluster(10);
  fixture.allocate('a', 2);
  fixture.nowMs = 3000;
  fixture.shard('s1', 10);
  fixture.nowMs = 5000;
  fixture.manager.tick();
  expect(fixture.executor('e2', OTHER_SPEC, 'big')).toMatchObject({ layout: { numLayers: 30 } });
  expect(fixture.manager.status().shards).toEqual([]);
  expect(fixture.shard('s1', 10)).toMatchObject({ known: false, layout: { numLayers: 30 } });
  expect(refusal(() => fixture.allocate('a', 1, 1, 'e2')).code).toBe('unavailable');
  fixture.join('s1-2', 3);
  expect(countByShard(fixture.allocate('a', 1, 1, 'e2'))).toEqual({ 's1-2': 1 });
});

test('the same spec under another model name keeps the shards', () => {
  const fixture = cluster(10);
  fixture.nowMs = 3000;
  fixture.shard('s1', 10);
  fixture.nowMs = 5000;
  fixture.manager.tick();
  fixture.executor('e2', undefined, 'tiny-v2');
  expect(countByShard(fixture.allocate('a', 1, 1, 'e2'))).toEqual({ s1: 1 });
});

test('refuses what can never fit, with the numbers', () => {
  const fixture = cluster(3, 2);
  const { code, message } = refusal(() => fixture.allocate('a', 1, 6));
  expect(code).toBe('kv_capacity_exceeded');
  expect(message).toContain('needs KV for 96 tokens');
  expect(message).toContain('2 attention shards hold 80');
  expect(fixture.allocate('a', 1, 5)).toHaveLength(1);
  expect(refusal(() => fixture.extend('a', 6)).code).toBe('kv_capacity_exceeded');
});

test('refuses as overloaded what does not fit now, all or nothing, and announces room once', () => {
  const fixture = cluster(3, 2);
  fixture.allocate('a', 3);
  const before = fixture.used();
  expect(refusal(() => fixture.allocate('b', 3)).code).toBe('overloaded');
  expect(fixture.used()).toEqual(before);
  expect(fixture.freed).toEqual([]);
  fixture.manager.free('a', 'e1');
  expect(fixture.freed).toEqual([5]);
  fixture.allocate('b', 3);
  fixture.manager.free('b', 'e1');
  expect(fixture.freed).toEqual([5]);
});

test('a refused extend leaves its table as it was; a joining shard is announced', () => {
  const fixture = cluster(3);
  fixture.allocate('a', 2, 3);
  fixture.allocate('b', 1, 3);
  expect(refusal(() => fixture.extend('a', 3)).code).toBe('overloaded');
  fixture.join('s2', 5);
  expect(fixture.freed).toEqual([5]);
  expect(countByShard(fixture.extend('a', 3))).toEqual({ s2: 1 });
});

test('without a ready shard, or unregistered, the answer is unavailable', () => {
  const fixture = new Fixture();
  expect(refusal(() => fixture.allocate('a', 1)).code).toBe('unavailable');
  fixture.executor('e1');
  fixture.shard('s1', null);
  expect(refusal(() => fixture.allocate('a', 1)).message).toContain('no attention shard is ready');
  fixture.shard('s1', 4);
  expect(fixture.freed).toEqual([4]);
});

test('extend: unknown request is invalid; covered tokens need nothing', () => {
  const fixture = cluster(3);
  expect(refusal(() => fixture.extend('a', 1)).code).toBe('invalid_request');
  fixture.allocate('a', 1, 3);
  const asked = { requestId: 'a', executorId: 'e1', numBlocks: 1 };
  expect(fixture.manager.extend({ ...asked, numTokens: BLOCK })).toEqual([]);
  expect(fixture.manager.extend({ ...asked, numTokens: BLOCK + 1 })).toHaveLength(1);
});

test('extend asked again, because its answer was lost, gives the same blocks and takes no more', () => {
  const fixture = cluster(6);
  fixture.allocate('a', 1, 6);
  const lost = fixture.extend('a', 3, 'e1', true);
  expect(fixture.extend('a', 3)).toEqual(lost);
  expect(fixture.used()).toEqual({ s1: 3 });
  const lostToo = fixture.extend('a', 4, 'e1', true);
  const more = fixture.extend('a', 5);
  expect(more).toHaveLength(2);
  expect(more[0]).toEqual(lostToo[0]);
  expect(fixture.used()).toEqual({ s1: 5 });
  // Also when the cache is full by now: nothing new is needed.
  const last = fixture.extend('a', 6, 'e1', true);
  expect(fixture.extend('a', 6)).toEqual(last);
  const asked = { requestId: 'a', executorId: 'e1', numTokens: 6 * BLOCK };
  expect(refusal(() => fixture.manager.extend({ ...asked, numBlocks: 7 })).code).toBe('invalid_request');
  fixture.trim('a', 2);
  expect(refusal(() => fixture.manager.extend({ ...asked, numBlocks: 1 })).code).toBe('invalid_request');
});

test('trim frees from the start, counted from the beginning; what is left keeps its place', () => {
  const fixture = cluster(4);
  fixture.executor('e2');
  const blocks = fixture.allocate('a', 4);
  expect(refusal(() => fixture.allocate('b', 1)).code).toBe('overloaded');
  fixture.trim('a', 2);
  expect(fixture.freed).toEqual([2]);
  expect(fixture.used()).toEqual({ s1: 2 });
  for (const numFreed of [0, 1, 2]) fixture.trim('a', numFreed);
  fixture.trim('a', 3, 'e2');
  fixture.trim('unknown', 3);
  expect(fixture.used()).toEqual({ s1: 2 });
  expect(refusal(() => fixture.trim('a', 5)).code).toBe('invalid_request');
  // Room for six blocks of tokens in a cluster of four: two are trimmed.
  const added = fixture.extend('a', 6);
  expect(new Set(added.map(({ block }) => block))).toEqual(new Set(blocks.slice(0, 2).map(({ block }) => block)));
  fixture.trim('a', 6);
  expect(fixture.used()).toEqual({ s1: 0 });
  expect(fixture.extend('a', 7)).toHaveLength(1);
  fixture.manager.free('a', 'e1');
  expect(fixture.used()).toEqual({ s1: 0 });
});

test('a request that trims stays where it is, however long it becomes, and only shards that it is on can void it', () => {
  const fixture = cluster(8);
  fixture.join('s2', 8);
  const [first] = fixture.allocate('a', 4, 4);
  for (let numTokenBlocks = 5; numTokenBlocks < 40; numTokenBlocks++) {
    fixture.trim('a', numTokenBlocks - 4);
    expect(fixture.extend('a', numTokenBlocks)).toMatchObject([{ shardId: first!.shardId }]);
  }
  fixture.manager.removeShard(first!.shardId === 's1' ? 's2' : 's1', 'shard left');
  expect(fixture.executor('e1').voidRequestIds).toEqual([]);
  fixture.manager.removeShard(first!.shardId, 'shard left');
  expect(fixture.executor('e1').voidRequestIds).toEqual(['a']);
});

test('another model is named by all that tells it apart', () => {
  const fixture = new Fixture();
  const spec = { numLayers: 2, numHeads: 2, numKvHeads: 1, headDim: 8, scale: 1 };
  const special = {
    ...spec,
    softcap: 30,
    windowTokens: [4, 0],
    sinkLogits: [
      [1, 1],
      [1, 1],
    ],
    alibiSlopes: [1, 1],
  };
  fixture.executor('e1', spec);
  const { message } = refusal(() => fixture.executor('e2', special));
  expect(message).toContain('scale 1)');
  expect(message).toContain('scale 1, soft-cap 30, windows 4/0, sinks, ALiBi)');
});

test('allocating again replaces the own table', () => {
  const fixture = cluster(4);
  fixture.allocate('a', 3, 4);
  expect(fixture.allocate('a', 4)).toHaveLength(4);
  expect(fixture.used()).toEqual({ s1: 4 });
});

test('free is idempotent and for the owner only', () => {
  const fixture = cluster(4);
  fixture.executor('e2');
  fixture.allocate('a', 3);
  fixture.manager.free('a', 'e2');
  fixture.manager.free('a', 'nobody');
  expect(fixture.used()).toEqual({ s1: 3 });
  fixture.manager.free('a', 'e1');
  fixture.manager.free('a', 'e1');
  expect(fixture.used()).toEqual({ s1: 0 });
});

test('a request taken over leaves its former blocks out of use until the former owner gives them up', () => {
  const fixture = cluster(4);
  fixture.executor('e2');
  const former = fixture.allocate('a', 2);
  const taken = fixture.allocate('a', 2, 2, 'e2', 2);
  expect(taken.filter((ref) => former.some((other) => other.block === ref.block))).toEqual([]);
  expect(fixture.executor('e1')).toMatchObject({ voidRequestIds: [], takenOverRequestIds: ['a'] });
  expect(refusal(() => fixture.extend('a', 3)).code).toBe('duplicate_id');
  fixture.manager.free('a', 'e1');
  expect(fixture.used()).toEqual({ s1: 2 });
  expect(fixture.executor('e1').takenOverRequestIds).toEqual([]);
  expect(fixture.extend('a', 3, 'e2')).toHaveLength(1);
});

test('who was offered a request earlier never takes it back, full cache or not', () => {
  const fixture = cluster(4);
  fixture.executor('e2');
  fixture.allocate('a', 1);
  fixture.allocate('a', 3, 3, 'e2', 2);
  // Its own former table goes, and no more: the owner keeps what it has.
  expect(refusal(() => fixture.allocate('a', 2)).code).toBe('duplicate_id');
  expect(fixture.used()).toEqual({ s1: 3 });
  expect(fixture.executor('e2').takenOverRequestIds).toEqual([]);
  expect(fixture.extend('a', 4, 'e2')).toHaveLength(1);
  expect(refusal(() => fixture.allocate('a', 1)).code).toBe('duplicate_id');
  // It was offered to the first again: now the second has to go.
  expect(refusal(() => fixture.allocate('a', 1, 1, 'e1', 3)).code).toBe('overloaded');
  expect(fixture.executor('e2').takenOverRequestIds).toEqual([]);
  fixture.join('s2', 4);
  expect(fixture.allocate('a', 1, 1, 'e1', 3)).toHaveLength(1);
  expect(fixture.executor('e2').takenOverRequestIds).toEqual(['a']);
});

test.each(['leaves', 'is silent'])('a shard that %s voids every table that has blocks there', (how) => {
  const fixture = cluster(8, 8);
  fixture.allocate('long', 12);
  fixture.allocate('short', 1);
  const shortShard = countByShard(fixture.extend('short', 2));
  if (how === 'leaves') fixture.manager.removeShard('s2', 'shard left');
  else {
    fixture.nowMs = 3999;
    fixture.executor('e1');
    fixture.shard('s1', 8);
    fixture.manager.tick();
    expect(fixture.lostShards).toEqual([]);
    fixture.nowMs = 4000;
    fixture.manager.tick();
  }
  expect(fixture.lostShards).toEqual(['s2']);
  expect(refusal(() => fixture.extend('long', 13)).code).toBe('shard_lost');
  expect(fixture.executor('e1').voidRequestIds).toEqual(Object.hasOwn(shortShard, 's2') ? ['long', 'short'] : ['long']);
  // The owner asks again: its blocks on the shard that is left are given up first.
  expect(fixture.allocate('long', 6)).toHaveLength(6);
  expect(fixture.shard('s2', 8).known).toBe(false);
});

test('a shard from an earlier kv-manager must come again under a new id', () => {
  const fixture = new Fixture();
  fixture.executor('e1');
  expect(fixture.shard('old', 5)).toMatchObject({ known: false });
  expect(fixture.manager.status().shards).toEqual([]);
});

test('a shard cannot have more blocks than the budget that it named holds', () => {
  const fixture = cluster();
  // 6 layers x (k, v) x 2 kv heads x 32 x 2 bytes, 16 tokens.
  const blockBytes = 6 * 2 * 2 * 32 * 2 * BLOCK;
  const budgetBytes = 8 * blockBytes + blockBytes - 1;
  fixture.shard('s1', null, 0, budgetBytes);
  // What it says later of its budget does not count.
  const { code, message } = refusal(() => fixture.shard('s1', 9, 0, 2 ** 50));
  expect(code).toBe('protocol_violation');
  expect(message).toContain(
    `says that it has 9 blocks: its budget of ${budgetBytes} bytes holds 8 of ${blockBytes} bytes`,
  );
  expect(fixture.manager.status().shards).toMatchObject([{ numBlocks: 0 }]);
  fixture.shard('s1', 8, 0, budgetBytes);
  expect(fixture.manager.status().shards).toMatchObject([{ numBlocks: 8 }]);
});

test('a shard that lies about its budget too makes the kv-manager hold no memory for it', () => {
  const fixture = cluster();
  const numBlocks = 2 ** 27 - 1;
  fixture.shard('s1', null, 0, 2 ** 50);
  const before = process.memoryUsage.rss();
  fixture.shard('s1', numBlocks, 0, 2 ** 50);
  expect(process.memoryUsage.rss() - before).toBeLessThan(64e6);
  expect(fixture.allocate('a', 2)).toEqual([
    { shardId: 's1', block: 0 },
    { shardId: 's1', block: 1 },
  ]);
  expect(fixture.manager.status().shards).toMatchObject([{ numBlocks, usedBlocks: 2 }]);
});

test('a shard cannot change its number of blocks, nor have more slots than the wire can name', () => {
  const fixture = cluster(8);
  expect(refusal(() => fixture.shard('s1', 9)).code).toBe('protocol_violation');
  fixture.shard('s2', null);
  expect(refusal(() => fixture.shard('s2', 2 ** 27)).code).toBe('protocol_violation');
});

test('the peak of used blocks is kept', () => {
  const fixture = cluster(8);
  fixture.allocate('a', 5);
  fixture.manager.free('a', 'e1');
  expect(fixture.shard('s1', 8)).toMatchObject({ usedBlocks: 0, usedBlocksPeak: 5 });
  expect(fixture.manager.status().shards).toMatchObject([{ usedBlocksPeak: 5 }]);
});

test('a pool refuses to take from nothing and to free twice', () => {
  const pool = new BlockPool('s', 1);
  expect(pool.take()).toBe(0);
  expect(() => pool.take()).toThrow('no free block');
  pool.giveBack(0);
  expect(() => pool.giveBack(0)).toThrow('freed twice');
  expect(() => pool.giveBack(7)).toThrow('freed twice');
});
