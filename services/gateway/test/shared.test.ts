import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { shared } from '../src/http/shared.ts';

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

test('who asks within the time is given the same, who asks later a new one', async () => {
  let asked = 0;
  const ask = shared(() => Promise.resolve(++asked), 1_000);
  expect(await Promise.all(Array.from({ length: 100 }, ask))).toEqual(new Array(100).fill(1));
  vi.advanceTimersByTime(999);
  expect(await ask()).toBe(1);
  vi.advanceTimersByTime(1);
  expect([await ask(), await ask()]).toEqual([2, 2]);
});

test('a failure is told to those who wait for it only', async () => {
  let asked = 0;
  const ask = shared(() => (asked++ === 0 ? Promise.reject(new Error('lost')) : Promise.resolve('found')), 1_000);
  const waiting = [ask(), ask()];
  for (const each of waiting) await expect(each).rejects.toThrow('lost');
  expect(await ask()).toBe('found');
});
