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
