import { expect, test } from 'vitest';
import { LargePrompts } from '../src/large-prompts.ts';

test('of any number the last 10,000 are remembered, each under its sequence and time', () => {
  const large = new LargePrompts();
  const terms = { id: 'x', deadlineAtMs: Infinity };
  for (let sequence = 1; sequence <= 10_002; sequence++) large.add({ sequence, storedAtMs: 5 }, terms, sequence);
  const isKnown = (sequence: number, storedAtMs = 5): boolean => large.of({ sequence, storedAtMs }) !== undefined;
  expect([1, 2, 3, 10_002].map((sequence) => isKnown(sequence))).toEqual([false, false, true, true]);
  expect(isKnown(10_002, 6)).toBe(false);
  expect(large.of({ sequence: 10_002, storedAtMs: 5 })?.neededTokens).toBe(10_002);
  large.delete({ sequence: 10_002 });
  expect(isKnown(10_002)).toBe(false);
});
