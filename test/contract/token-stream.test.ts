import { ensureStreams, TokenStream } from '@lamina/bus';
import { decodeTokens, STREAMS, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { connect as connectRaw } from 'nats';
import { beforeEach, describe, expect, test } from 'vitest';
import { client, nats, renewStreams, server, token, useBus } from './bus-bench.ts';
import { eventually } from './in-process.ts';
import { store } from './store-answer.ts';

useBus();

describe('the token stream', () => {
  let writer: TokenStream;
  let reader: TokenStream;
  let failures: LaminaError[];

  beforeEach(async () => {
    failures = [];
    await renewStreams(client);
    writer = new TokenStream(server, (error) => failures.push(error));
    reader = new TokenStream(client, (error) => failures.push(error));
  });

  interface Reading {
    readonly messages: TokenMessage[];
    readonly finals: boolean[];
    stop(): void;
  }

  async function replay(id: string): Promise<Reading> {
    const messages: TokenMessage[] = [];
    const finals: boolean[] = [];
    const subscription = await reader.replay(id, (data, isFinal) => {
      messages.push(...decodeTokens(data));
      finals.push(isFinal);
    });
    return { messages, finals, stop: () => subscription.unsubscribe() };
  }

  const complete = (reading: Reading): Promise<true> =>
    eventually(() => (reading.finals.at(-1) === true ? true : undefined));

  test('a reader that comes late, in the middle or early gets every token once, in order, and the end', async () => {
    const early = await replay('answer');
    const ANSWER = [token('answer', 0), token('answer', 1), token('answer', 2), token('answer', 3, 'stop')];
    expect(await store(writer, ANSWER.slice(0, 1))).toBeGreaterThan(0);
    const middle = await replay('answer');
    await store(writer, ANSWER.slice(1, 3), 'msgpack');
    await store(writer, ANSWER.slice(3));
    const late = await replay('answer');
    for (const reading of [early, middle, late]) {
      await complete(reading);
      expect(reading.messages).toEqual(ANSWER);
      expect(reading.finals).toEqual([false, false, true]);
      reading.stop();
    }
    expect(failures).toEqual([]);
  });

  test('tokens that are published again, as by an executor that took over, are stored once', async () => {
    const followed: number[] = [];
    const following = reader.follow('again', ({ data }) =>
      followed.push(...decodeTokens(data).map(({ index }) => index)),
    );
    await client.flush();
    const other = new TokenStream(client, () => undefined);
    let last = 0;
    for (const index of [0, 1, 2]) {
      const stored = await writer.append([token('again', index)], 'json', last);
      for (const stream of [writer, other])
        expect(await stream.append([token('again', index)], 'json', last)).toBe(stored);
      last = stored!;
    }
    await expect(other.append([token('again', 2), token('again', 3)], 'json', 0)).rejects.toMatchObject({
      code: 'duplicate_id',
    });
    await store(writer, [token('again', 3, 'length')]);
    const reading = await replay('again');
    await complete(reading);
    expect(reading.messages.map(({ index }) => index)).toEqual([0, 1, 2, 3]);
    expect(followed.filter((index, i) => followed.indexOf(index) === i)).toEqual([0, 1, 2, 3]);
    reading.stop();
    following.unsubscribe();
  });

  test('answers do not mix, though their ids begin alike', async () => {
    await Promise.all(['x', 'x-1', 'x1'].map((id) => store(writer, [token(id, 0, 'stop')])));
    const reading = await replay('x');
    await complete(reading);
    expect(reading.messages.map(({ id }) => id)).toEqual(['x']);
    reading.stop();
    expect(await Promise.all(['x', 'x1', 'x2'].map((id) => reader.endOf(id)))).toMatchObject([
      { isComplete: true },
      { isComplete: true },
      undefined,
    ]);
  });

  test('the last message says so to any client of NATS, and only the last', async () => {
    const raw = await connectRaw({ servers: nats.url });
    const seen: string[] = [];
    raw.subscribe(SUBJECTS.tokens('*'), {
      callback: (_, message) => seen.push(`${message.subject} ${message.headers?.get('Lamina-Final') ?? ''}`),
    });
    await raw.flush();
    await store(writer, [token('plain', 0)]);
    await store(writer, [token('plain', 1), token('plain', 2, 'cancelled')]);
    await eventually(() => (seen.length === 2 ? true : undefined));
    expect(seen).toEqual(['lamina.v1.tokens.plain ', 'lamina.v1.tokens.plain true']);
    await raw.close();
  });

  test('messages of others on the subject of an answer are no part of it, wherever they stand', async () => {
    const intrude = async (): Promise<void> => {
      client.publish(SUBJECTS.tokens('mixed'), Buffer.from('{"stream":"LAMINA_PROMPTS","seq":3}'));
      await client.flush();
    };
    const followed: TokenMessage[] = [];
    const following = reader.follow('mixed', ({ data }) => followed.push(...decodeTokens(data)));
    const early = await replay('mixed');
    await client.flush();
    await intrude();
    expect(await reader.endOf('mixed')).toBeUndefined();
    expect(await reader.stored('mixed')).toEqual({ tokens: [], lastSequence: 0, deliveryCount: 0 });
    const first = await writer.append([token('mixed', 0)], 'json', 0);
    await intrude();
    expect(await reader.endOf('mixed')).toMatchObject({ sequence: first, isComplete: false });
    const second = await writer.append([token('mixed', 1)], 'json', first!);
    await intrude();
    // Its confirmation was lost: it is stored, though it is not the last message on the subject.
    const again = await writer.append([token('mixed', 1)], 'json', first!);
    await expect(writer.append([token('mixed', 2)], 'json', first!)).rejects.toMatchObject({ code: 'duplicate_id' });
    expect(again).toBeGreaterThan(second!);
    const end = await writer.append([token('mixed', 2, 'stop')], 'json', again!);
    await intrude();
    expect(await reader.endOf('mixed')).toMatchObject({ sequence: end, isComplete: true });
    const late = await replay('mixed');
    for (const reading of [early, late]) {
      await complete(reading);
      expect(reading.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
      reading.stop();
    }
    expect((await reader.stored('mixed')).tokens).toHaveLength(3);
    expect(new Set(followed.map(({ index }) => index))).toEqual(new Set([0, 1, 2]));
    following.unsubscribe();
    expect(failures).toEqual([]);
  });

  test('an answer whose beginning the stream has discarded is stored again by whoever starts anew', async () => {
    const first = await writer.append([token('gone', 0)], 'json', 0);
    const manager = await client.connection.jetstreamManager();
    const { config } = await manager.streams.info(STREAMS.tokens.name);
    await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs: 1 });
    await store(writer, [token('other', 0)]);
    expect(await reader.endOf('gone')).toBeUndefined();
    // Within the time for which the server remembers the ids of messages.
    await expect(writer.append([token('gone', 1)], 'json', first!)).rejects.toMatchObject({ code: 'duplicate_id' });
    await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs: -1 });
    const { tokens, lastSequence } = await reader.stored('gone');
    expect(tokens).toEqual([]);
    const again = await writer.append([token('gone', 0)], 'json', lastSequence);
    await writer.append([token('gone', 1, 'stop')], 'json', again!);
    expect((await reader.stored('gone')).tokens.map(({ index }) => index)).toEqual([0, 1]);
  });

  test('an answer says how often its item had been given out to whoever stored last', async () => {
    const first = await writer.append([token('given', 0)], 'json', 0);
    expect(await reader.stored('given')).toMatchObject({ lastSequence: first, deliveryCount: 1 });
    const second = await writer.append([token('given', 1)], 'json', first!, 12);
    expect(await reader.stored('given')).toMatchObject({ lastSequence: second, deliveryCount: 12 });
    client.publish(SUBJECTS.tokens('given'), Buffer.from('{}'));
    await client.flush();
    expect((await reader.stored('given')).deliveryCount).toBe(12);
  });

  test('what is left of an answer whose beginning was discarded is not taken for it, and its end is known', async () => {
    const manager = await client.connection.jetstreamManager();
    const { config } = await manager.streams.info(STREAMS.tokens.name);
    await store(writer, [token('half', 0), token('half', 1)]);
    await store(writer, [token('half', 2), token('half', 3)]);
    const last = await store(writer, [token('half', 4)]);
    expect((await reader.stored('half')).tokens).toHaveLength(5);
    expect(await reader.endOf('half')).toMatchObject({ sequence: last, isComplete: false, nextIndex: 5 });
    for (const max_msgs of [2, 1]) {
      await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs });
      await expect(reader.stored('half')).rejects.toMatchObject({ code: 'unknown_request', retryable: false });
      expect(await reader.endOf('half')).toMatchObject({ sequence: last, isComplete: false, nextIndex: 5 });
    }
    // By a message of somebody else behind it, too.
    await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs: 2 });
    client.publish(SUBJECTS.tokens('half'), Buffer.from('{}'));
    await client.flush();
    await expect(reader.stored('half')).rejects.toMatchObject({ code: 'unknown_request' });
    expect(await reader.endOf('half')).toMatchObject({ sequence: last, nextIndex: 5 });
    await manager.streams.update(STREAMS.tokens.name, { ...config, max_msgs: -1 });
    await store(writer, [{ ...token('half', 5, 'error'), token: null, text: '' }]);
    const reading = await replay('half');
    await complete(reading);
    expect(reading.messages.map(({ index }) => index)).toEqual([4, 5]);
    expect(await reader.endOf('half')).toMatchObject({ isComplete: true, nextIndex: undefined });
    reading.stop();
  });

  test('reading what is stored leaves nothing behind', async () => {
    const manager = await client.connection.jetstreamManager();
    await store(writer, [token('short', 0, 'stop')]);
    for (let round = 0; round < 20; round++) expect((await reader.stored('short')).tokens).toHaveLength(1);
    // The server forgets a consumer some seconds after nobody listens to it any more.
    await eventually(async () => {
      const { consumer_count } = (await manager.streams.info(STREAMS.tokens.name)).state;
      return consumer_count === 0 ? true : undefined;
    }, 10_000);
    expect(failures).toEqual([]);
  }, 20_000);

  test('a long answer is read however long that takes, while messages of it come', async () => {
    const text = 'x'.repeat(16_384);
    let last = 0;
    for (let index = 0; index < 480; index++)
      last = (await writer.append([{ ...token('long', index), text }], 'json', last))!;
    let isRead = false;
    const startMs = performance.now();
    const keepBusy = (): void => {
      const untilMs = performance.now() + 120;
      while (performance.now() < untilMs);
      if (!isRead) setImmediate(keepBusy);
    };
    setImmediate(keepBusy);
    const { tokens } = await reader.stored('long').finally(() => (isRead = true));
    expect(tokens).toHaveLength(480);
    expect(performance.now() - startMs).toBeGreaterThan(5_500);
  }, 60_000);

  test('who follows is not given what was refused behind what is stored, but told to ask the stream', async () => {
    const followed: number[] = [];
    let doubts = 0;
    const following = reader.follow(
      'lagging',
      ({ data }) => followed.push(...decodeTokens(data).map(({ index }) => index)),
      () => doubts++,
    );
    await client.flush();
    const first = await writer.append([token('lagging', 0)], 'json', 0);
    const second = await writer.append([token('lagging', 1)], 'json', first!);
    // What is stored may reach the reader after its confirmation has reached the writer.
    await eventually(() => (followed.includes(1) ? true : undefined));
    expect([followed, doubts]).toEqual([[0, 1], 0]);
    // Of an executor that another has taken over from.
    const late = ['x', 'y', 'z'].map((text, at) => ({ ...token('lagging', 1 + at), text }));
    await expect(writer.append(late, 'json', first!)).rejects.toMatchObject({ code: 'duplicate_id' });
    await writer.append([token('lagging', 2, 'stop')], 'json', second!);
    await eventually(() => (followed.includes(2) ? true : undefined));
    expect([followed, doubts]).toEqual([[0, 1, 2], 1]);
    following.unsubscribe();
  });

  test('what can never be stored is reported and refused', async () => {
    const large = { ...token('large', 0), text: 'x'.repeat(server.maxPayloadBytes) };
    await expect(store(writer, [large])).rejects.toMatchObject({ code: 'invalid_request' });
    const manager = await client.connection.jetstreamManager();
    await manager.streams.delete(STREAMS.tokens.name);
    await expect(writer.append([token('lost', 0)], 'json', 0)).rejects.toMatchObject({ code: 'unavailable' });
    expect(failures).toHaveLength(2);
    await expect(reader.endOf('lost')).rejects.toMatchObject({ code: 'unavailable' });
    await ensureStreams(client);
  });
});
