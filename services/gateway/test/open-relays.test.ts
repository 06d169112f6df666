import { expect, test } from 'vitest';
import { OpenRelays } from '../src/open-relays.ts';

const relay = (id: string): { readonly id: string } => ({ id });

test('relays are found by their request, however many have the same', () => {
  const open = new OpenRelays();
  const [a, again, b] = [relay('a'), relay('a'), relay('b')];
  for (const each of [a, again, b]) open.add(each, 'alice');
  expect([open.size, open.of('a'), open.of('b'), open.of('c'), open.all()]).toEqual([
    3,
    [a, again],
    [b],
    [],
    [a, again, b],
  ]);
  expect([open.delete(a), open.delete(a)]).toEqual([true, false]);
  expect([open.of('a')[0] === again, open.has('a'), open.size]).toEqual([true, true, 2]);
  open.delete(again);
  expect([open.has('a'), open.of('a')]).toEqual([false, []]);
});

test('a client is counted as it comes and goes, a relay of nobody is in no count', () => {
  const open = new OpenRelays();
  const own = relay('a');
  const strays = [relay('b'), relay('c')];
  open.add(own, 'gateway');
  for (const stray of strays) open.add(stray, undefined);
  expect([open.numOf('gateway'), open.size]).toEqual([1, 3]);
  for (const stray of strays) open.delete(stray);
  expect([open.numOf('gateway'), open.size]).toEqual([1, 1]);
  open.delete(own);
  expect([open.numOf('gateway'), open.size]).toEqual([0, 0]);
});

test('a cancel does not cost more when more relays are open', () => {
  const open = new OpenRelays();
  for (let index = 0; index < 50_000; index++) open.add(relay(`r${index}`), 'alice');
  const before = process.cpuUsage();
  let found = 0;
  for (let index = 0; index < 50_000; index++) found += open.of(`r${index}`).length;
  expect(found).toBe(50_000);
  // To look at all for each would be 2.5 billion comparisons.
  expect(process.cpuUsage(before).user).toBeLessThan(1_000_000);
});
