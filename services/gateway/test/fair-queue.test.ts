import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { FairQueue } from '../src/fair-queue.ts';

interface Entry {
  readonly client: string;
  readonly costTokens: number;
  readonly priority: number;
  readonly name: string;
}

let numEntries = 0;
const entry = (client: string, costTokens = 10, priority = 0): Entry => ({
  client,
  costTokens,
  priority,
  name: `${client}${numEntries++}`,
});

function drain(queue: FairQueue<Entry>): Entry[] {
  const entries: Entry[] = [];
  for (let next = queue.shift(); next !== undefined; next = queue.shift()) entries.push(next);
  return entries;
}
const clientsOf = (entries: readonly Entry[]): string => entries.map(({ client }) => client).join('');

function filled(...entries: Entry[]): FairQueue<Entry> {
  const queue = new FairQueue<Entry>();
  for (const each of entries) queue.push(each);
  return queue;
}

describe('clients', () => {
  test('take turns, however many requests one of them has', () => {
    const queue = filled(...Array.from({ length: 100 }, () => entry('a')), entry('b'), entry('c'));
    expect(clientsOf(drain(queue)).slice(0, 5)).toBe('abcaa');
  });

  test('have the same number of tokens, not of requests', () => {
    const large = Array.from({ length: 10 }, () => entry('a', 100));
    const small = Array.from({ length: 40 }, () => entry('b', 10));
    const first = drain(filled(...large, ...small)).slice(0, 22);
    expect(first.filter(({ client }) => client === 'a')).toHaveLength(2);
  });

  test('that come late have no claim for the time that they were away, nor a debt for what they had before', () => {
    const queue = filled(...Array.from({ length: 20 }, () => entry('a')));
    for (let count = 0; count < 10; count++) queue.shift();
    for (let count = 0; count < 10; count++) queue.push(entry('b'));
    expect(clientsOf(drain(queue)).slice(0, 6)).toMatch(/^(ab){3}|(ba){3}$/);
  });

  test('that come again and again with one request get no more than others', () => {
    const queue = filled(...Array.from({ length: 20 }, () => entry('a')), entry('b'));
    let taken = '';
    for (let count = 0; count < 20; count++) {
      const next = queue.shift();
      taken += next?.client;
      if (next?.client === 'b') queue.push(entry('b'));
    }
    expect(taken.split('b')).toHaveLength(11);
  });
});

test("a priority orders one client's requests and harms no other", () => {
  const queue = filled(entry('a'), entry('a', 10, 5), entry('b', 10, -5), entry('a', 10, 5));
  expect(drain(queue).map(({ client, priority }) => `${client}${priority}`)).toEqual(['a5', 'b-5', 'a5', 'a0']);
});

test('a visit tells how many get a place before each', () => {
  fc.assert(
    fc.property(fc.array(fc.constantFrom('a', 'b', 'c', 'd'), { maxLength: 100 }), (clients) => {
      const queue = filled(...clients.map((client) => entry(client)));
      const visited: Entry[] = [];
      queue.visit((each, numBefore) => {
        expect(visited).toHaveLength(numBefore);
        visited.push(each);
      });
      expect(visited).toEqual(drain(queue));
    }),
  );
});

test('whatever comes and goes: each is served once, none that was withdrawn, and none waits behind a busy client', () => {
  const command = fc.record({
    action: fc.constantFrom('push', 'push', 'shift', 'remove'),
    client: fc.constantFrom('a', 'b', 'c'),
    costTokens: fc.integer({ min: 1, max: 50 }),
    priority: fc.integer({ min: -1, max: 1 }),
  });
  fc.assert(
    fc.property(fc.array(command, { maxLength: 200 }), (commands) => {
      const queue = new FairQueue<Entry>();
      const waiting = new Set<Entry>();
      /** Tokens that others were given since a client began to wait without a turn. */
      const passedTokens = new Map<string, number>();
      for (const { action, client, costTokens, priority } of commands) {
        if (action === 'push') {
          const each = entry(client, costTokens, priority);
          if (![...waiting].some((other) => other.client === client)) passedTokens.set(client, 0);
          waiting.add(each);
          queue.push(each);
        } else if (action === 'remove') {
          const each = [...waiting].find((other) => other.client === client);
          if (each !== undefined) queue.remove(each);
          if (each !== undefined) waiting.delete(each);
        } else {
          const next = queue.shift();
          expect(next === undefined).toBe(waiting.size === 0);
          if (next === undefined) continue;
          expect(waiting.delete(next)).toBe(true);
          for (const other of new Set([...waiting].map((each) => each.client))) {
            const passed = (passedTokens.get(other) ?? 0) + next.costTokens;
            passedTokens.set(other, other === next.client ? 0 : passed);
            // Two others, each at most one of its largest ahead of and one behind this client's last.
            expect(passedTokens.get(other)).toBeLessThanOrEqual(2 * 3 * 50);
          }
        }
        expect(queue.size).toBe(waiting.size);
      }
    }),
    { numRuns: 1_000 },
  );
});

/** What the queue is to do, without a thought of time: all clients are looked at. */
class SlowFairQueue {
  #lines: { client: string; entries: Entry[]; startTokens: number }[] = [];
  readonly #served = new Map<string, number>();
  #virtualTokens = 0;

  push(each: Entry): void {
    let line = this.#lines.find(({ client }) => client === each.client);
    if (line === undefined) {
      const startTokens = Math.max(this.#virtualTokens, this.#served.get(each.client) ?? 0);
      line = { client: each.client, entries: [], startTokens };
      this.#lines.push(line);
    }
    line.entries.push(each);
    line.entries.sort((one, other) => other.priority - one.priority);
  }

  shift(): Entry | undefined {
    const least = Math.min(...this.#lines.map(({ startTokens }) => startTokens));
    const next = this.#lines.find(({ startTokens }) => startTokens === least);
    const each = next?.entries.shift();
    if (next === undefined || each === undefined) return undefined;
    this.#virtualTokens = next.startTokens;
    next.startTokens += each.costTokens;
    this.#served.set(next.client, next.startTokens);
    this.#dropEmpty();
    return each;
  }

  remove(each: Entry): void {
    for (const line of this.#lines) line.entries = line.entries.filter((other) => other !== each);
    this.#dropEmpty();
  }

  #dropEmpty(): void {
    this.#lines = this.#lines.filter(({ entries }) => entries.length > 0);
    if (this.#lines.length > 0) return;
    this.#served.clear();
    this.#virtualTokens = 0;
  }
}

test('the order is that of a search through all clients', () => {
  const command = fc.record({
    action: fc.constantFrom('push', 'push', 'push', 'shift', 'remove'),
    client: fc.integer({ min: 0, max: 12 }).map(String),
    costTokens: fc.integer({ min: 1, max: 5 }),
    priority: fc.integer({ min: -1, max: 1 }),
  });
  fc.assert(
    fc.property(fc.array(command, { maxLength: 300 }), (commands) => {
      const queue = new FairQueue<Entry>();
      const slow = new SlowFairQueue();
      const waiting: Entry[] = [];
      for (const { action, client, costTokens, priority } of commands) {
        const each = action === 'push' ? entry(client, costTokens, priority) : waiting[costTokens];
        if (action === 'push') waiting.push(each!);
        for (const other of [queue, slow]) {
          if (action === 'push') other.push(each!);
          if (action === 'remove' && each !== undefined) other.remove(each);
        }
        if (action === 'shift') expect(queue.shift()).toBe(slow.shift());
      }
      for (const each of drain(queue)) expect(each).toBe(slow.shift());
      expect(slow.shift()).toBeUndefined();
    }),
    { numRuns: 500 },
  );
});

test('many of one client keep their order', () => {
  const entries = Array.from({ length: 2_000 }, () => entry('a'));
  const queue = filled(...entries.slice(0, 1_000));
  const taken = Array.from({ length: 700 }, () => queue.shift());
  for (const each of entries.slice(1_000)) queue.push(each);
  queue.remove(entries[0]!);
  queue.remove(entries[900]!);
  expect(queue.size).toBe(1_299);
  expect([...taken, ...drain(queue)]).toEqual(entries.filter((_, index) => index !== 900));
});

test.each([
  ['20,000 clients with one request each', 20_000, 1],
  ['one client with 100,000', 1, 100_000],
])('%s are let in without a search through all: within 5 s, where that takes half a minute', (_, numClients, each) => {
  const queue = new FairQueue<Entry>();
  for (let turn = 0; turn < each; turn++)
    for (let client = 0; client < numClients; client++) queue.push(entry(`c${client}`));
  const startMs = performance.now();
  expect(drain(queue)).toHaveLength(numClients * each);
  expect(performance.now() - startMs).toBeLessThan(5_000);
});
