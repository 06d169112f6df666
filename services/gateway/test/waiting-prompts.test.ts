import type { DurablePrompt } from '@lamina/bus';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { WaitingPrompts } from '../src/waiting-prompts.ts';

/** What the server knows of a prompt that was set aside. */
interface Kept {
  lapsesAtMs: number;
  numMessages: number;
}

let waiting: WaitingPrompts;
let kept: Map<number, Kept>;

beforeEach(() => {
  vi.useFakeTimers();
  waiting = new WaitingPrompts();
  kept = new Map();
});
afterEach(() => {
  waiting.putBack();
  expect(vi.getTimerCount()).toBe(0);
  vi.useRealTimers();
});

function offered(sequence: number): DurablePrompt {
  const fail = (): never => {
    throw new Error('not in hand');
  };
  const keep = (keepMs: number): void => {
    const numMessages = (kept.get(sequence)?.numMessages ?? 0) + 1;
    kept.set(sequence, { lapsesAtMs: performance.now() + keepMs, numMessages });
  };
  return {
    sequence,
    storedAtMs: 0,
    data: new Uint8Array(),
    header: fail,
    done: fail,
    putBack: fail,
    setAside: (keepMs) => {
      keep(keepMs);
      return { sequence, keep, open: fail, putBack: () => kept.delete(sequence) };
    },
  };
}

/** How long the server would keep a prompt from others if this gateway died now; 0 and less: it has offered it to them. */
const restMs = (sequence: number): number => kept.get(sequence)!.lapsesAtMs - performance.now();
const numMessages = (): number => [...kept.values()].reduce((sum, each) => sum + each.numMessages, 0);

function fill(count: number): void {
  for (let sequence = 1; sequence <= count; sequence++) waiting.add(offered(sequence), 'busy');
}

test('none lapses, and each is kept for as long as those before it may take', async () => {
  fill(10_000);
  const before = numMessages();
  let leastMs = Number.POSITIVE_INFINITY;
  let mostOfOwn = 0;
  for (let second = 0; second < 300; second++) {
    await vi.advanceTimersByTimeAsync(1_000);
    for (const sequence of kept.keys()) {
      leastMs = Math.min(leastMs, restMs(sequence));
      mostOfOwn = Math.max(mostOfOwn, restMs(sequence) / (5_000 + 12 * sequence));
    }
  }
  expect(leastMs).toBeGreaterThan(1_000);
  expect(mostOfOwn).toBeLessThan(1.5);
  expect((numMessages() - before) / 300).toBeLessThan(600);
});

test('what comes nearer to its place is kept for less', async () => {
  fill(3_000);
  for (let second = 0; second < 14; second++) {
    for (let taken = 0; taken < 200; taken++) kept.delete(waiting.next()!.aside.sequence);
    await vi.advanceTimersByTimeAsync(1_000);
  }
  expect(waiting.size).toBe(200);
  for (const sequence of kept.keys()) expect(restMs(sequence)).toBeLessThan(12_000);
});

test("one client's many do not make another's kept for long", async () => {
  fill(10_000);
  for (const client of ['a', 'b', 'c']) waiting.add(offered(20_000 + client.charCodeAt(0)), client);
  await vi.advanceTimersByTimeAsync(1_000);
  for (const client of ['a', 'b', 'c']) expect(restMs(20_000 + client.charCodeAt(0))).toBeLessThan(6_000);
});

test('one that is offered again, or that could not be opened, waits once', () => {
  fill(2);
  waiting.add(offered(1), 'busy');
  const first = waiting.next()!;
  expect(first.aside.sequence).toBe(1);
  waiting.addAgain(first);
  waiting.addAgain(first);
  expect([waiting.next(), waiting.next(), waiting.next()].map((each) => each?.aside.sequence)).toEqual([
    1,
    2,
    undefined,
  ]);
});
