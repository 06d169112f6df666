/** What the judge of a chaos run must find: every way in which an answer can be told wrongly. */
import type { TokenMessage } from '@lamina/protocol';
import { expect, test } from 'vitest';
import { Received } from './clients/received.ts';
import { compare } from './verdict.ts';

const NUM_TOKENS = 4;
const expected = Array.from({ length: NUM_TOKENS }, (_, index) => ({ token: 10 + index, text: `t${index}` }));

const messageOf = (index: number, change: Partial<TokenMessage> = {}): TokenMessage => ({
  id: 'a',
  index,
  ...expected[index]!,
  finish_reason: index === NUM_TOKENS - 1 ? 'length' : null,
  ...change,
});
const STORED = expected.map((_, index) => messageOf(index));
const RIGHT = { isLost: false, numDoubled: 0, isWrong: false };

/** Connections, each of the indices that it gave. */
function received(...connections: readonly (readonly number[])[]): Received {
  const all = new Received();
  for (const indices of connections) {
    all.connect(0);
    for (const index of indices) {
      const { token, text, finish_reason } = messageOf(index);
      all.take(index, { token: token ?? 0, text }, finish_reason);
    }
  }
  return all;
}

test('a right answer', () => {
  expect(compare(expected, { stored: STORED, received: undefined })).toMatchObject(RIGHT);
  expect(compare(expected, { stored: STORED, received: received([0, 1, 2, 3]) })).toMatchObject(RIGHT);
});

test('an answer that came over several connections, each from its start, or behind what was there', () => {
  const whole = received([0, 1], [], [0, 1, 2], [0, 1, 2, 3]);
  expect(compare(expected, { stored: STORED, received: whole })).toMatchObject(RIGHT);
  expect(whole.numResumed).toBe(2);
  const rest = received([0, 1]);
  rest.connect(2);
  for (const index of [2, 3]) rest.take(index, { text: `t${index}` }, messageOf(index).finish_reason);
  expect(compare(expected, { stored: STORED, received: rest })).toMatchObject(RIGHT);
});

test.each([
  ['a token that is stored twice', [...STORED.slice(0, 2), messageOf(1), ...STORED.slice(2)], { numDoubled: 1 }],
  ['another token', [STORED[0]!, messageOf(1, { token: 99 }), ...STORED.slice(2)], { isWrong: true }],
  [
    'the right token with another text',
    [STORED[0]!, messageOf(1, { text: '' }), ...STORED.slice(2)],
    { isWrong: true },
  ],
  ['a missing token', [STORED[0]!, ...STORED.slice(2)], { isLost: true }],
  ['a missing end', STORED.slice(0, 3), { isLost: true }],
  ['another end', [...STORED.slice(0, 3), messageOf(3, { finish_reason: 'cancelled' })], { isLost: true }],
  ['nothing', [], { isLost: true }],
])('%s is found in what is stored', (_, stored, found) => {
  expect(compare(expected, { stored, received: undefined })).toMatchObject({ ...RIGHT, ...found });
});

test('a token twice on one connection, a gap, a missing end and a mistake are found in what a client got', () => {
  const judge = (client: Received): object => compare(expected, { stored: STORED, received: client });
  expect(judge(received([0, 1, 1, 2, 3]))).toMatchObject({ ...RIGHT, numDoubled: 1 });
  expect(judge(received([0, 1, 3]))).toMatchObject({ ...RIGHT, isLost: true });
  expect(judge(received([0, 1, 2]))).toMatchObject({ ...RIGHT, isLost: true });
  const mistaken = received([0, 1, 2, 3]);
  mistaken.mistakes.push('no gateway listens');
  expect(judge(mistaken)).toMatchObject({ ...RIGHT, isLost: true });
});

test('another token than the undisturbed one, or than the one before, is found in what a client got', () => {
  const other = received([0]);
  other.take(1, { token: 99, text: 't1' }, null);
  expect(compare(expected, { stored: STORED, received: other })).toMatchObject({ isWrong: true });
  const changed = received([0, 1]);
  changed.connect(0);
  changed.take(0, { token: 10, text: 'other' }, null);
  expect(changed.mistakes).toHaveLength(1);
});
