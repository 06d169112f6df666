import { expect, test } from 'vitest';
import { growthPercent } from './trend.ts';

const perMinute = (values: readonly number[]) => values.map((value, index) => ({ atMs: 60_000 * index, value }));

test('a line is itself', () => {
  expect(growthPercent(perMinute([100, 101, 102, 103, 104]))).toBeCloseTo(4, 10);
  expect(growthPercent(perMinute([100, 100]))).toBe(0);
});

test('a leak is seen under noise', () => {
  const values = Array.from({ length: 25 }, (_, minute) => 200 + 0.5 * minute + [3, -4, 0, 5, -2][minute % 5]!);
  expect(growthPercent(perMinute(values))).toBeGreaterThan(5);
});

test('few points elsewhere do not make a trend, whichever they are', () => {
  for (const odd of [0, 5, 9]) {
    const values = Array.from({ length: 10 }, (_, minute) => (minute === odd ? 73 : 86));
    expect(growthPercent(perMinute(values))).toBe(0);
  }
});

test('one moment has no trend', () => {
  expect(() => growthPercent(perMinute([1]))).toThrow(RangeError);
});
