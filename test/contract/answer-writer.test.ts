/** Answers as they are stored: whole, in order and once, though nats-server dies in the middle and executors take over. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { AnswerWriter, type Bus, ensureStreams, TokenStream } from '@lamina/bus';
import { decodeTokens, STREAMS, type TokenMessage } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { connect, eventually } from './in-process.ts';
import { store } from './store-answer.ts';

let storeDir: string;
let nats: NatsServer;
let bus: Bus;
let stream: TokenStream;
let numErrors: number;
let refusals: LaminaError[];
const onRefused = (error: LaminaError): void => {
  refusals.push(error);
};

beforeEach(async () => {
  storeDir = mkdtempSync(join(tmpdir(), 'lamina-store-'));
  nats = await startNatsServer({ storeDir });
  bus = await connect(nats.url);
  await ensureStreams(bus);
  numErrors = 0;
  refusals = [];
  stream = new TokenStream(bus, () => numErrors++);
});
afterEach(async () => {
  await bus.close();
  await nats.stop();
  rmSync(storeDir, { recursive: true, force: true });
});

const token = (index: number, finish: TokenMessage['finish_reason'] = null): TokenMessage => ({
  id: 'answer',
  index,
  token: index,
  text: `t${index}`,
  finish_reason: finish,
});
const end = (index: number): TokenMessage => ({
  id: 'answer',
  index,
  token: null,
  text: '',
  finish_reason: 'cancelled',
});

/** Indices per stored message, up to the end of the answer. */
async function stored(): Promise<number[][]> {
  const messages: number[][] = [];
  let isEnded = false;
  const subscription = await stream.replay('answer', (data, isFinal) => {
    messages.push(decodeTokens(data).map(({ index }) => index));
    isEnded = isFinal;
  });
  await eventually(() => (isEnded ? true : undefined));
  subscription.unsubscribe();
  return messages;
}

const upTo = (count: number): number[] => Array.from({ length: count }, (_, index) => index);

test('nats-server is killed twice in the middle: every token is stored once and in order', async () => {
  const writer = new AnswerWriter(stream, 'json', 0, onRefused);
  let index = 0;
  const push = async (count: number): Promise<void> => {
    for (let i = 0; i < count; i++) {
      writer.push(token(index++));
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  };
  for (const numMeanwhile of [0, 150]) {
    await push(100);
    // The last messages are under way; more follow while nothing can be stored.
    await nats.kill();
    await push(numMeanwhile);
    nats = await startNatsServer({ storeDir, port: nats.port });
    await push(50);
    expect(await writer.stored()).toBe(true);
  }
  writer.push(token(index++, 'length'));
  expect(await writer.stored()).toBe(true);
  expect((await stored()).flat()).toEqual(upTo(index));
}, 30_000);

test('an executor that takes over groups the tokens otherwise: each is stored once', async () => {
  const former = new AnswerWriter(stream, 'json', 0, onRefused);
  for (const index of [0, 1, 2, 3]) {
    former.push(token(index));
    await former.stored();
  }
  const { tokens, lastSequence } = await stream.stored('answer');
  expect(tokens.map(({ index }) => index)).toEqual(upTo(4));
  // The first goes alone, the rest while it is under way.
  const next = new AnswerWriter(stream, 'json', lastSequence, onRefused);
  for (const index of [4, 5, 6, 7]) next.push(token(index, index === 7 ? 'stop' : null));
  expect(await next.stored()).toBe(true);
  // The former stood still and goes on: its grouping is another, and it has not heard of anything.
  for (const index of [4, 5, 6]) former.push(token(index));
  await former.stored();
  former.push(end(7));
  expect(await former.stored()).toBe(false);
  expect((await stored()).flat()).toEqual(upTo(8));
  expect(refusals).toMatchObject([{ code: 'duplicate_id' }]);
});

test('two that write the same answer at once, grouped as it comes: each token is stored once', async () => {
  const other = await connect(nats.url);
  try {
    for (let round = 0; round < 10; round++) {
      const id = `race-${round}`;
      const writers = [stream, new TokenStream(other, () => numErrors++)].map(
        (of) => new AnswerWriter(of, 'json', 0, onRefused),
      );
      for (const index of upTo(40))
        for (const [at, writer] of writers.entries()) {
          writer.push({ ...token(index, index === 39 ? 'length' : null), id });
          if ((index + round) % (3 + 2 * at) === 0) await new Promise((resolve) => setTimeout(resolve, 1));
        }
      const isStored = await Promise.all(writers.map((writer) => writer.stored()));
      expect(isStored).toContain(true);
      const indices: number[] = [];
      const subscription = await stream.replay(id, (data) =>
        indices.push(...decodeTokens(data).map(({ index }) => index)),
      );
      await eventually(() => (indices.includes(39) ? true : undefined));
      subscription.unsubscribe();
      expect(indices).toEqual(upTo(40));
    }
    // Otherwise the race was none.
    expect(refusals.length).toBeGreaterThan(0);
    expect(new Set(refusals.map(({ code }) => code))).toEqual(new Set(['duplicate_id']));
  } finally {
    await other.close();
  }
});

test('an own message that was stored with its confirmation lost is no other writer', async () => {
  const first = await stream.append([token(0)], 'json', 0);
  expect(await stream.append([token(0)], 'json', 0)).toBe(first);
  const second = await stream.append([token(1)], 'json', first!);
  await expect(stream.append([token(0)], 'json', 0)).rejects.toMatchObject({ code: 'duplicate_id' });
  expect(await stream.append([end(2)], 'json', second!)).toBeGreaterThan(second!);
  expect(await stored()).toEqual([[0], [1], [2]]);
});

test('the end that a gateway stores stops the executor', async () => {
  const executor = new AnswerWriter(stream, 'json', 0, onRefused);
  executor.push(token(0));
  await executor.stored();
  expect(await store(stream, [end(1)])).toBeGreaterThan(0);
  executor.push(token(1));
  expect(await executor.stored()).toBe(false);
  expect(await stored()).toEqual([[0], [1]]);
  expect(refusals).toMatchObject([{ code: 'duplicate_id' }]);
});

test('an end without a token is a message of its own, stored once whoever writes it', async () => {
  const executor = new AnswerWriter(stream, 'json', 0, onRefused);
  for (const message of [token(0), token(1), token(2), end(3)]) executor.push(message);
  await executor.stored();
  await expect(stream.append([end(2)], 'json', 0)).rejects.toMatchObject({ code: 'duplicate_id' });
  expect(await stored()).toEqual([[0, 1, 2], [3]]);
});

test('however much waits, a message stays far below what the server takes', async () => {
  const writer = new AnswerWriter(stream, 'json', 0, onRefused);
  const alternatives = Array.from({ length: 20 }, (_, i) => ({
    token: i,
    text: 'alternative',
    logprob: -1.234567890123,
  }));
  for (let index = 0; index < 2_000; index++)
    writer.push({ ...token(index, index === 1_999 ? 'stop' : null), logprob: -1, top_logprobs: alternatives });
  expect(await writer.stored()).toBe(true);
  expect((await stored()).flat()).toEqual(upTo(2_000));
  expect(numErrors).toBe(0);
});

test('what cannot be stored because the bus was closed is said, also when asked later', async () => {
  const writer = new AnswerWriter(stream, 'json', 0, onRefused);
  await nats.kill();
  writer.push(token(0));
  const isStored = writer.stored();
  await bus.connection.close();
  expect(await isStored).toBe(false);
  expect(await writer.stored()).toBe(false);
}, 10_000);

describe('what can never be stored', () => {
  const huge = (index: number): TokenMessage => ({ ...token(index), text: 'x'.repeat(bus.maxPayloadBytes) });

  test('because a token is too large ends the answer with an error that says so', async () => {
    const writer = new AnswerWriter(stream, 'json', 0, onRefused);
    for (const message of [token(0), token(1), huge(2), token(3), token(4, 'stop')]) writer.push(message);
    expect(await writer.stored()).toBe(true);
    writer.push(token(5));
    const { tokens: answer } = await stream.stored('answer');
    expect(answer.map(({ index }) => index)).toEqual([0, 1, 2]);
    expect(answer[2]).toMatchObject({
      token: null,
      finish_reason: 'error',
      error: { code: 'invalid_request', message: expect.stringContaining('max_payload') },
    });
    expect(refusals).toHaveLength(1);
  });

  test('as one message is stored as several', async () => {
    const writer = new AnswerWriter(stream, 'json', 0, onRefused);
    const large = 'x'.repeat(bus.maxPayloadBytes / 5);
    for (const index of upTo(12)) writer.push({ ...token(index, index === 11 ? 'stop' : null), text: large });
    expect(await writer.stored()).toBe(true);
    expect((await stored()).flat()).toEqual(upTo(12));
    expect(refusals).toEqual([]);
  });

  test('because the stream was deleted is said at once, and not tried for ever', async () => {
    const manager = await bus.connection.jetstreamManager();
    await manager.streams.delete(STREAMS.tokens.name);
    const writer = new AnswerWriter(stream, 'json', 0, onRefused);
    writer.push(token(0));
    expect(await writer.stored()).toBe(false);
    expect(refusals).toMatchObject([{ code: 'unavailable', message: expect.stringContaining('LAMINA_TOKENS') }]);
  });

  test('because the user may not is said at once', async () => {
    const restricted = await startNatsServer({ denyPublish: ['lamina.v1.tokens.*'] });
    const other = await connect(restricted.url);
    try {
      await ensureStreams(other);
      const writer = new AnswerWriter(new TokenStream(other, () => numErrors++), 'json', 0, onRefused);
      writer.push(token(0));
      expect(await writer.stored()).toBe(false);
      expect(refusals).toMatchObject([{ message: expect.stringContaining('may not publish') }]);
    } finally {
      await other.close();
      await restricted.stop();
    }
  });
});
