/** Where blocks go. */
import { expect, test } from 'vitest';
import { countByShard, Fixture } from './fixture.ts';

function cluster(...numBlocks: number[]): Fixture {
  const fixture = new Fixture();
  fixture.executor('e1');
  for (const [i, blocks] of numBlocks.entries()) fixture.join(`s${i + 1}`, blocks);
  return fixture;
}

test('a short request stays on one shard, the next goes to the least used one', () => {
  const fixture = cluster(100, 100, 100);
  expect(countByShard(fixture.allocate('a', 4))).toEqual({ s1: 4 });
  expect(countByShard(fixture.allocate('b', 3))).toEqual({ s2: 3 });
  expect(countByShard(fixture.allocate('c', 2))).toEqual({ s3: 2 });
  expect(countByShard(fixture.allocate('d', 2))).toEqual({ s3: 2 });
});

test('least used is relative to the size of the shard', () => {
  const fixture = cluster(10, 1000);
  fixture.allocate('a', 2);
  expect(countByShard(fixture.allocate('b', 4))).toEqual({ s2: 4 });
  expect(countByShard(fixture.allocate('c', 4))).toEqual({ s2: 4 });
});

test('a short request that grows stays on its shard, and goes on elsewhere when that is full', () => {
  const fixture = cluster(4, 100);
  expect(countByShard(fixture.allocate('a', 1))).toEqual({ s1: 1 });
  expect(countByShard(fixture.extend('a', 2))).toEqual({ s1: 1 });
  fixture.allocate('b', 1);
  expect(fixture.used()).toEqual({ s1: 2, s2: 1 });
  fixture.manager.free('b', 'e1');
  expect(countByShard(fixture.extend('a', 4))).toEqual({ s1: 2 });
  const full = cluster(3, 100);
  full.allocate('a', 2);
  expect(countByShard(full.extend('a', 4))).toEqual({ s1: 1, s2: 1 });
});

test('a prompt that fits no shard whole still gets its blocks', () => {
  expect(countByShard(cluster(2, 2, 2).allocate('a', 4))).toEqual({ s1: 2, s2: 2 });
});

test('a long request is spread evenly, its first tokens counted', () => {
  const blocks = cluster(1000, 1000, 1000, 1000).allocate('a', 40);
  expect(blocks.slice(0, 4).every((ref) => ref.shardId === 's1')).toBe(true);
  expect(countByShard(blocks)).toEqual({ s1: 10, s2: 10, s3: 10, s4: 10 });
});

test('a few blocks of others do not unbalance a long request', () => {
  const fixture = cluster(1000, 1000);
  fixture.allocate('other', 4);
  fixture.allocate('more', 1);
  expect(countByShard(fixture.allocate('a', 40))).toEqual({ s1: 20, s2: 20 });
});

test('memory stays even within a sixteenth when shards differ in size', () => {
  const fixture = cluster(64, 640);
  for (let i = 0; i < 6; i++) fixture.allocate(`r${i}`, 60);
  const { s1, s2 } = fixture.used();
  expect(Math.abs(s1! / 64 - s2! / 640)).toBeLessThan(2 / 16);
});

test('a shard that joins gets the next block of a long request', () => {
  const fixture = cluster(100);
  fixture.allocate('a', 20, 40);
  fixture.join('late', 100);
  expect(countByShard(fixture.extend('a', 21))).toEqual({ late: 1 });
  expect(countByShard(fixture.extend('a', 40))).toEqual({ late: 19 });
});
