import { CLOCK_TOLERANCE_MS } from '@lamina/protocol';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { type IsMeant, MAX_AT_A_TIME, MAX_WAITING, StrayCancels } from '../src/stray-cancels.ts';

const DELAY_MS = 300;
let ended: string[];
let finish: (() => void)[];
let meant: IsMeant[];
let strays: StrayCancels;

beforeEach(() => {
  vi.useFakeTimers();
  ended = [];
  finish = [];
  meant = [];
  strays = new StrayCancels(DELAY_MS, (id, isMeant) => {
    ended.push(id);
    meant.push(isMeant);
    return new Promise((resolve) => finish.push(resolve));
  });
});
afterEach(() => vi.useRealTimers());

test('a request is ended once, however often it is cancelled meanwhile, and again afterwards', async () => {
  for (let time = 0; time < 100; time++) expect(strays.add('a')).toBe(true);
  await vi.advanceTimersByTimeAsync(DELAY_MS - 1);
  expect(ended).toEqual([]);
  await vi.advanceTimersByTimeAsync(1);
  strays.add('a');
  await vi.advanceTimersByTimeAsync(DELAY_MS);
  expect(ended).toEqual(['a']);
  finish[0]!();
  await vi.advanceTimersByTimeAsync(0);
  strays.add('a');
  await vi.advanceTimersByTimeAsync(DELAY_MS);
  expect(ended).toEqual(['a', 'a']);
});

test('few are seen to at a time, the others wait, and one too many is refused', async () => {
  const limit = MAX_WAITING + MAX_AT_A_TIME;
  for (let index = 0; index < limit; index++) expect(strays.add(`r${index}`)).toBe(true);
  expect(strays.add('one-more')).toBe(false);
  await vi.advanceTimersByTimeAsync(DELAY_MS);
  expect(ended).toHaveLength(MAX_AT_A_TIME);
  for (let done = 0; done < limit; done++) {
    finish[done]!();
    await vi.advanceTimersByTimeAsync(0);
  }
  expect(new Set(ended).size).toBe(limit);
  expect(strays.add('one-more')).toBe(true);
});

test('a cancel that had to wait means what was submitted before it, and before the last one of the same id', async () => {
  for (let index = 0; index < MAX_AT_A_TIME; index++) strays.add(`r${index}`);
  strays.add('late');
  const firstMs = Date.now();
  await vi.advanceTimersByTimeAsync(2_000);
  expect(ended).not.toContain('late');
  finish[0]!();
  await vi.advanceTimersByTimeAsync(0);
  expect(ended.at(-1)).toBe('late');
  const isMeant = meant.at(-1)!;
  const after = firstMs + CLOCK_TOLERANCE_MS + 1;
  expect([firstMs - 60_000, firstMs, after].map(isMeant)).toEqual([true, true, false]);
  strays.add('late');
  expect(isMeant(after)).toBe(true);
});

test('after it has stopped none is ended', async () => {
  strays.add('a');
  strays.stop();
  expect(strays.add('b')).toBe(false);
  await vi.advanceTimersByTimeAsync(DELAY_MS);
  expect(ended).toEqual([]);
});
