import { LaminaError } from '@lamina/tensor';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { createComplaints, MAX_PER_WINDOW, Registry, WINDOW_MS } from '../src/index.ts';

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

test('every failed message is counted, few are logged, and how many were not', async () => {
  const lines: { fields: Record<string, unknown>; text: string }[] = [];
  const registry = new Registry();
  const log = { error: (fields: Record<string, unknown>, text: string) => lines.push({ fields, text }) };
  const complain = createComplaints(log, registry);
  const count = async (): Promise<string> => (await registry.metrics()).match(/code="overloaded"\} (\d+)/)?.[1] ?? '0';

  for (let time = 0; time < 1_000; time++) complain(new LaminaError('overloaded', 'full'), 'lamina.v1.generate');
  expect(lines).toHaveLength(MAX_PER_WINDOW);
  expect(lines[0]).toMatchObject({ fields: { subject: 'lamina.v1.generate' }, text: 'message failed' });
  expect(await count()).toBe('1000');

  vi.advanceTimersByTime(WINDOW_MS);
  expect(lines.splice(0).at(-1)).toMatchObject({ fields: { numUnlogged: 1_000 - MAX_PER_WINDOW } });

  complain(new LaminaError('overloaded', 'full'));
  vi.advanceTimersByTime(WINDOW_MS);
  expect(lines.map(({ text }) => text)).toEqual(['message failed']);
  expect(await count()).toBe('1001');
});
