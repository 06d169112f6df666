/** Executors that leave or fall silent: their blocks are fenced, and what they had begun is counted. */
import { beforeEach, describe, expect, test } from 'vitest';
import { cluster, type Fixture, OTHER_SPEC, refusal } from './fixture.ts';

/** Four of eight blocks on s1 and five of eight on s2 are of e1, which is lost; e2 is registered. */
function lossOfExecutor(): Fixture {
  const fixture = cluster(8, 8);
  fixture.executor('e1', undefined, undefined, [11, 12]);
  fixture.allocate('a', 6);
  fixture.allocate('b', 3);
  expect(fixture.used()).toEqual({ s1: 4, s2: 5 });
  fixture.nowMs = 4000;
  fixture.executor('e2');
  for (const shardId of ['s1', 's2']) expect(fixture.shard(shardId, 8).fences).toEqual([]);
  fixture.manager.tick();
  return fixture;
}

test('the blocks of an executor that falls silent are free when every shard refuses its origins, and room is announced', () => {
  const fixture = lossOfExecutor();
  expect(fixture.manager.status()).toMatchObject({ executors: [{ executorId: 'e2' }], numRequests: 0 });
  expect(refusal(() => fixture.allocate('c', 8, 8, 'e2')).code).toBe('overloaded');
  const fences = [{ number: 1, originIds: [1, 11, 12] }];
  // Told until it confirms; one shard of two is not enough.
  for (let beat = 0; beat < 2; beat++) expect(fixture.shard('s1', 8).fences).toEqual(fences);
  expect(fixture.shard('s1', 8, 1).fences).toEqual([]);
  expect(refusal(() => fixture.allocate('c', 8, 8, 'e2')).code).toBe('overloaded');
  expect(fixture.used()).toEqual({ s1: 4, s2: 5 });
  expect(fixture.shard('s2', 8).fences).toEqual(fences);
  expect(fixture.freed).toEqual([]);
  expect(fixture.manager.numFences).toBe(1);
  expect(fixture.shard('s2', 8, 1)).toMatchObject({ fences: [], usedBlocks: 0 });
  expect(fixture.freed).toEqual([16]);
  expect(fixture.manager.numFences).toBe(0);
  expect(fixture.allocate('c', 16, 16, 'e2')).toHaveLength(16);
});

test('a fence waits for no shard that is lost or has no block of it, and ends with another layout', () => {
  const fixture = lossOfExecutor();
  fixture.join('s3', 2);
  expect(fixture.shard('s3', 2).fences).toEqual([]);
  fixture.shard('s1', 8, 1);
  fixture.nowMs = 8000;
  fixture.executor('e2');
  fixture.shard('s1', 8);
  fixture.shard('s3', 2);
  fixture.manager.tick();
  expect(fixture.lostShards).toEqual(['s2']);
  expect(fixture.manager.numFences).toBe(0);
  expect(fixture.used()).toEqual({ s1: 0, s3: 0 });
  fixture.allocate('c', 10, 10, 'e2');
  fixture.manager.executorLeave('e2');
  expect(fixture.manager.numFences).toBe(1);
  fixture.executor('e3', OTHER_SPEC, 'big');
  expect(fixture.manager.numFences).toBe(0);
});

describe('executors that are lost', () => {
  let fixture: Fixture;
  let numExecutors: number;
  /** One that begins the request as its delivery, and ends. */
  function begin(deliveryCount: number, end: 'lost' | 'left', numVain = deliveryCount): void {
    const executorId = `x${numExecutors++}`;
    fixture.executor(executorId);
    fixture.allocate('a', 1, 1, executorId, deliveryCount, numVain);
    if (end === 'left') fixture.manager.executorLeave(executorId);
    fixture.nowMs += 4_000;
    fixture.executor('e1');
    fixture.shard('s1', 64);
    fixture.manager.tick();
    const lastFence = fixture.shard('s1', 64).fences.at(-1);
    if (lastFence !== undefined) fixture.shard('s1', 64, lastFence.number);
  }
  beforeEach(() => {
    fixture = cluster(64);
    numExecutors = 0;
  });

  test('ten in a row that had begun a request, and stored nothing of it: it is given up', () => {
    for (let delivery = 1; delivery <= 10; delivery++) begin(delivery, 'lost');
    expect(refusal(() => begin(11, 'lost'))).toMatchObject({
      code: 'internal',
      message: expect.stringMatching(/^given up: 10 /),
    });
    fixture.allocate('b', 1);
  });

  test('those that leave do not count, nor deliveries that began nothing', () => {
    for (let delivery = 1; delivery <= 9; delivery++) begin(delivery, 'lost');
    for (let delivery = 10; delivery <= 40; delivery += 3) begin(delivery, 'left');
    begin(50, 'lost');
    expect(refusal(() => begin(51, 'lost')).code).toBe('internal');
  });

  test('those before something was stored do not count', () => {
    for (let delivery = 1; delivery <= 10; delivery++) begin(delivery, 'lost');
    // The tenth had stored something.
    for (let delivery = 11; delivery <= 20; delivery++) begin(delivery, 'lost', delivery - 10);
    expect(refusal(() => begin(21, 'lost', 11)).code).toBe('internal');
  });
});

test('an executor that leaves is fenced too: a step of it may be in flight. Without blocks there is nothing to wait for', () => {
  const fixture = cluster(4);
  fixture.executor('e2', undefined, undefined, [2]);
  fixture.manager.executorLeave('e2');
  expect(fixture.manager.numFences).toBe(0);
  fixture.allocate('a', 1);
  fixture.manager.executorLeave('e1');
  expect(fixture.shard('s1', 4).fences).toEqual([{ number: 1, originIds: [1] }]);
  expect(refusal(() => fixture.shard('s1', 4, 2)).code).toBe('protocol_violation');
  fixture.shard('s1', 4, 1);
  expect(fixture.used()).toEqual({ s1: 0 });
});

test('a fence names every origin of its registration, the oldest not if they are many; a reply has the oldest fences', () => {
  const fixture = cluster(32);
  for (let origin = 2; origin <= 513; origin++) fixture.executor('e1', undefined, undefined, [origin]);
  fixture.allocate('a', 1);
  fixture.manager.executorLeave('e1');
  expect(fixture.shard('s1', 32).fences).toEqual([
    { number: 1, originIds: Array.from({ length: 512 }, (_, i) => i + 2) },
  ]);
  for (let number = 2; number <= 18; number++) {
    fixture.executor('e1');
    fixture.allocate('a', 1);
    fixture.manager.executorLeave('e1');
  }
  const numbers = fixture.shard('s1', 32).fences.map(({ number }) => number);
  expect(numbers).toEqual(Array.from({ length: 16 }, (_, i) => i + 1));
  expect(fixture.shard('s1', 32, 16).fences.map(({ number }) => number)).toEqual([17, 18]);
  expect(fixture.used()).toEqual({ s1: 2 });
});

test('an executor that falls silent is registered anew, and hears so', () => {
  const fixture = cluster(8);
  fixture.allocate('a', 5);
  fixture.nowMs = 4000;
  fixture.shard('s1', 8);
  fixture.manager.tick();
  expect(fixture.manager.status()).toMatchObject({ executors: [], numRequests: 0, shards: [{ usedBlocks: 5 }] });
  expect(fixture.shard('s1', 8, 1).usedBlocks).toBe(0);
  // Said again for as long as it is registered: the first reply may be lost.
  for (let beat = 0; beat < 2; beat++) expect(fixture.executor('e1').registration).toBe(2);
});

test('silence does not count while nobody could be heard', () => {
  const fixture = cluster(8);
  fixture.nowMs = 60_000;
  fixture.manager.forgiveSilence();
  fixture.manager.tick();
  expect(fixture.manager.status().executors).toHaveLength(1);
  expect(fixture.lostShards).toEqual([]);
});
