import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { CLOCK_TOLERANCE_MS, MAX_AGE_MS, MAX_REMEMBERED, PastCancels } from '../src/past-cancels.ts';

let cancels: PastCancels;

beforeEach(() => {
  vi.useFakeTimers();
  cancels = new PastCancels();
});
afterEach(() => vi.useRealTimers());

test('a cancel ends what was submitted before it, or later by no more than clocks differ', () => {
  const cameAtMs = Date.now();
  expect(cancels.add('a')).toBe(true);
  expect(cancels.hasCancelled('a', 0)).toBe(true);
  expect(cancels.hasCancelled('a', cameAtMs + CLOCK_TOLERANCE_MS)).toBe(true);
  expect(cancels.hasCancelled('a', cameAtMs + CLOCK_TOLERANCE_MS + 1)).toBe(false);
  expect(cancels.hasCancelled('b', 0)).toBe(false);
});

test('of several cancels of an id the last one counts, and is the newest', () => {
  const firstAtMs = Date.now();
  cancels.add('a');
  for (let index = 1; index < MAX_REMEMBERED; index++) cancels.add(`r${index}`);
  vi.setSystemTime(firstAtMs + 60_000);
  cancels.add('a');
  cancels.add('one-more');
  expect(cancels.hasCancelled('a', firstAtMs + 60_000)).toBe(true);
  expect(cancels.hasCancelled('r1', 0)).toBe(false);
  expect(cancels.hasCancelled('r2', 0)).toBe(true);
});

test('one that is too old for every request is forgotten', () => {
  cancels.add('a');
  vi.setSystemTime(Date.now() + MAX_AGE_MS);
  cancels.add('b');
  expect(cancels.hasCancelled('a', 0)).toBe(false);
  expect(cancels.hasCancelled('b', 0)).toBe(true);
});

test.each(['', 'a.b', 'caf\u00e9', 'x'.repeat(65), 'x'.repeat(4_000)])('%j is no id and is not kept', (id) => {
  expect(cancels.add(id)).toBe(false);
  expect(cancels.hasCancelled(id, 0)).toBe(false);
});
