/** The bus over a real nats-server: what survives a hop, a bad message, a full queue and a restart. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ACK_WAIT_MS, Bus, ensureStreams, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import {
  decodeTokens,
  ENDPOINTS,
  EVENTS,
  packMessage,
  STREAMS,
  SUBJECTS,
  type TokenMessage,
  unpackMessage,
  type WorkItem,
} from '@lamina/protocol';
import { ERROR_CODES, type ErrorCode, isErrorCode, LaminaError } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { connect as connectRaw } from 'nats';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { connect, eventually } from './in-process.ts';
import { store } from './store-answer.ts';

const TIMEOUT = { timeoutMs: 2000 };
/** Shortest wait that a pull consumer takes. */
const LEASE_MS = 1000;

let nats: NatsServer;
let client: Bus;
let server: Bus;
let errors: { code: string; subject: string }[];

beforeAll(async () => {
  nats = await startNatsServer();
});
afterAll(() => nats.stop());
beforeEach(async () => {
  errors = [];
  client = await connect(nats.url);
  server = await Bus.connect(
    { url: nats.url, name: 'server', connectTimeoutMs: 5000 },
    { onError: ({ code }, subject) => errors.push({ code, subject }) },
  );
});
afterEach(async () => {
  await Promise.all([client.close(), server.close()]);
});

async function announce(
  bus: Bus = server,
  metadata: Record<string, string> = {},
  stats: unknown = null,
): Promise<void> {
  await bus.announce({ name: 'test-service', version: '0.1.0', description: '', metadata, stats: () => stats });
  await bus.flush();
}

describe('request and reply', () => {
  const CALL = { requestId: 'a', executorId: 'e', numTokens: 5, maxTokens: 9, deliveryCount: 1 };

  test('a typed body goes over and a typed reply comes back', async () => {
    await announce();
    const seen: unknown[] = [];
    server.serve(ENDPOINTS.allocate, async (body) => {
      seen.push(body);
      return { managerEpoch: 'm', blocks: [{ shardId: 's', block: body.numTokens }] };
    });
    await server.flush();
    expect(await client.request(ENDPOINTS.allocate, CALL, TIMEOUT)).toEqual({
      managerEpoch: 'm',
      blocks: [{ shardId: 's', block: 5 }],
    });
    expect(seen).toEqual([CALL]);
    // Who may only ask must not have the server publish elsewhere for it.
    for (const reply of ['lamina.v1.work.x', '$JS.API.STREAM.PURGE.LAMINA_WORK']) {
      const published: string[] = [];
      client.subscribe(reply, (message) => published.push(message.subject));
      errors.length = 0;
      for (const subject of [ENDPOINTS.allocate.subject, SUBJECTS.status(server.instanceId)])
        client.publish(subject, packMessage(CALL), reply);
      await client.request(ENDPOINTS.allocate, CALL, TIMEOUT);
      expect(published).toEqual([]);
      expect(errors.map(({ code }) => code)).toEqual(['protocol_violation', 'protocol_violation']);
    }
    expect(seen).toHaveLength(3);
  });

  test('every error code and its message survive, diagnostics and causes do not', async () => {
    await announce();
    server.serve(ENDPOINTS.free, ({ requestId }) => {
      if (isErrorCode(requestId)) throw new LaminaError(requestId, `it was ${requestId}`, { diagnostics: { a: 1 } });
      throw new TypeError('secret');
    });
    await server.flush();
    const ask = (requestId: string): Promise<unknown> =>
      client.request(ENDPOINTS.free, { requestId, executorId: 'e' }, TIMEOUT).catch((error: unknown) => error);
    const codes = Object.keys(ERROR_CODES) as ErrorCode[];
    const answers = (await Promise.all(codes.map(ask))) as LaminaError[];
    expect(answers.map(({ code, message, diagnostics }) => ({ code, message, diagnostics }))).toEqual(
      codes.map((code) => ({ code, message: `it was ${code}`, diagnostics: {} })),
    );
    const foreign = (await ask('other')) as LaminaError;
    expect([foreign.code, foreign.message.includes('secret')]).toEqual(['internal', false]);
    // Only defects are reported at the server; a refusal is an answer.
    expect(new Set(errors.map(({ code }) => code))).toEqual(new Set(['internal', 'protocol_violation']));
  });

  test('nobody there is unavailable at once; silence is, after the time given', async () => {
    const startMs = performance.now();
    await expect(client.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 20_000 })).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringContaining('no kv-manager answers'),
      diagnostics: { nats: '503' },
    });
    expect(performance.now() - startMs).toBeLessThan(5000);
    server.subscribe(ENDPOINTS.kvStatus.subject, () => undefined);
    await server.flush();
    await expect(client.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 100 })).rejects.toMatchObject({
      code: 'unavailable',
      diagnostics: { nats: 'TIMEOUT' },
    });
  });

  test('a malformed body is answered with protocol_violation, and the connection goes on', async () => {
    await announce();
    server.serve(ENDPOINTS.extend, () => ({ managerEpoch: 'm', blocks: [] }));
    await server.flush();
    const { subject } = ENDPOINTS.extend;
    const bodies = [new Uint8Array(0), Buffer.from('hello'), Buffer.of(0xc1), packMessage({ requestId: 'a.b' })];
    for (const body of bodies) {
      const answer = await new Promise<unknown>((resolve) => {
        const subscription = client.requestStream(subject, body, (reply) => {
          subscription.unsubscribe();
          resolve(reply === undefined ? undefined : unpackMessage(reply.data));
        });
      });
      expect(answer).toMatchObject({ error: { code: 'protocol_violation', message: expect.any(String) } });
    }
    expect(errors).toEqual(bodies.map(() => ({ code: 'protocol_violation', subject })));
    const call = { requestId: 'a', executorId: 'e', numBlocks: 1, numTokens: 5 };
    expect(await client.request(ENDPOINTS.extend, call, TIMEOUT)).toEqual({ managerEpoch: 'm', blocks: [] });
  });

  test('a malformed reply is a protocol_violation of the caller', async () => {
    const replies = [
      new Uint8Array(0),
      Buffer.from('hello'),
      packMessage(null),
      packMessage({}),
      packMessage({ ok: { managerEpoch: 5 } }),
      packMessage({ error: 'x' }),
      packMessage({ error: { code: 'oops', message: 'x' } }),
    ];
    let next = 0;
    server.subscribe(ENDPOINTS.allocate.subject, ({ reply }) => server.publish(reply!, replies[next++]!));
    await server.flush();
    for (const _ of replies)
      await expect(client.request(ENDPOINTS.allocate, CALL, TIMEOUT)).rejects.toMatchObject({
        code: 'protocol_violation',
      });
  });

  test('what is larger than a message is refused as such, in both directions', async () => {
    await announce();
    const blocks = new Array(100_000).fill({ shardId: 's'.repeat(20), block: 1 });
    server.serve(ENDPOINTS.allocate, () => ({ managerEpoch: 'm', blocks }));
    await server.flush();
    await expect(client.request(ENDPOINTS.allocate, CALL, TIMEOUT)).rejects.toMatchObject({ code: 'internal' });
    const body = { executorId: 'e', modelId: 'm'.repeat(client.maxPayloadBytes), spec: Object() };
    await expect(client.request(ENDPOINTS.executorHeartbeat, body, TIMEOUT)).rejects.toMatchObject({
      code: 'invalid_request',
      message: expect.stringContaining('max_payload'),
    });
  });

  test('a service that withdrew is not there any more, its connection is', async () => {
    await announce();
    server.serve(ENDPOINTS.kvStatus, () => {
      throw new LaminaError('overloaded', '');
    });
    const events: number[] = [];
    server.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => events.push(freeBlocks));
    await server.flush();
    await expect(client.request(ENDPOINTS.kvStatus, {}, TIMEOUT)).rejects.toMatchObject({ code: 'overloaded' });
    await server.withdraw();
    await server.flush();
    await expect(client.request(ENDPOINTS.kvStatus, {}, TIMEOUT)).rejects.toMatchObject({ code: 'unavailable' });
    client.publishEvent(EVENTS.capacityFreed, { freeBlocks: 3 });
    await eventually(() => events[0]);
    expect(events).toEqual([3]);
  });

  test('endpoints need an announced service', () => {
    expect(() => server.serve(ENDPOINTS.kvStatus, () => Object())).toThrow(LaminaError);
    expect(() => server.serveRaw('raw', 'raw', 'q', () => undefined)).toThrow(LaminaError);
  });
});

describe('events and raw messages', () => {
  test('a malformed event and a handler that throws are reported, and the next one is handled', async () => {
    const seen: number[] = [];
    server.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => {
      seen.push(freeBlocks);
      if (freeBlocks === 1) throw new Error('x');
    });
    await server.flush();
    const { subject } = EVENTS.capacityFreed;
    client.publish(subject, Buffer.from('hello'));
    client.publishEvent(EVENTS.capacityFreed, { freeBlocks: 1 });
    client.publishEvent(EVENTS.capacityFreed, { freeBlocks: 2 });
    await eventually(() => (seen.length === 2 ? true : undefined));
    expect(seen).toEqual([1, 2]);
    expect(errors).toEqual([
      { code: 'protocol_violation', subject },
      { code: 'internal', subject },
    ]);
  });

  test('a raw message keeps its bytes, reply and headers, in order, until unsubscribed', async () => {
    const seen: string[] = [];
    const subscription = server.subscribe('raw.*', ({ subject, data, reply, header }) =>
      seen.push(`${subject} ${Buffer.from(data).toString('hex')} ${reply} ${typeof header}`),
    );
    const headers: (string | undefined)[] = [];
    server.subscribe('headed', (message) => headers.push(message.header('A'), message.header('B')));
    await server.flush();
    client.publish('raw.1', Buffer.of(0, 255));
    client.publish('raw.2', new Uint8Array(0), 'answer');
    client.publishWithHeaders('headed', new Uint8Array(0), { A: 'true' });
    await eventually(() => (headers.length > 0 ? true : undefined));
    expect(seen).toEqual(['raw.1 00ff undefined function', 'raw.2  answer function']);
    expect(headers).toEqual(['true', undefined]);
    subscription.unsubscribe();
    client.publish('raw.3', new Uint8Array(0));
    client.publish('headed', new Uint8Array(0));
    await eventually(() => (headers.length > 2 ? true : undefined));
    expect(seen).toHaveLength(2);
  });

  test('a queue group gets each message once', async () => {
    const seen: string[] = [];
    for (const bus of [server, client]) {
      bus.subscribe('group', ({ data }) => seen.push(Buffer.from(data).toString()), { queue: 'q' });
      await bus.flush();
    }
    const numbers = Array.from({ length: 50 }, (_, i) => String(i));
    for (const number of numbers) client.publish('group', Buffer.from(number));
    await eventually(() => (seen.length >= 50 ? true : undefined));
    await Promise.all([client.flush(), server.flush()]);
    expect(seen.sort()).toEqual(numbers.sort());
  });

  test('a streamed request gets its replies in order; one that nobody hears is told so', async () => {
    server.subscribe('stream', ({ reply }) => {
      for (let i = 0; i < 20; i++) server.publish(reply!, Buffer.of(i));
    });
    await server.flush();
    const seen: (number | undefined)[] = [];
    const heard = client.requestStream('stream', new Uint8Array(0), (reply) => seen.push(reply?.data[0]));
    await eventually(() => (seen.length === 20 ? true : undefined));
    expect(seen).toEqual(Array.from({ length: 20 }, (_, i) => i));
    heard.unsubscribe();
    const unheard: unknown[] = [];
    const subscription = client.requestStream('nobody', new Uint8Array(0), (reply) => unheard.push(reply));
    await eventually(() => (unheard.length > 0 ? true : undefined));
    expect(unheard).toEqual([undefined]);
    subscription.unsubscribe();
  });

  test('requestAll collects what everyone says, and nothing where nobody is', async () => {
    for (const [bus, text] of [
      [server, 'a'],
      [client, 'b'],
    ] as const) {
      bus.subscribe('all', ({ reply }) => bus.publish(reply!, Buffer.from(text)));
      await bus.flush();
    }
    const answers = await client.requestAll('all', 300);
    expect(answers.map((answer) => Buffer.from(answer).toString()).sort()).toEqual(['a', 'b']);
    expect(await client.requestAll('nobody', 200)).toEqual([]);
  });

  test('serviceStats has every instance with its metadata and its own facts', async () => {
    await announce(server, { instance: 'one' }, { load: 1 });
    await announce(client, { instance: 'two' }, { load: 2 });
    const all = await client.serviceStats('test-service', 400);
    expect(
      all
        .map(({ metadata, data }) => ({ instance: metadata.instance, data }))
        .sort((a, b) => (a.instance! < b.instance! ? -1 : 1)),
    ).toEqual([
      { instance: 'one', data: { load: 1 } },
      { instance: 'two', data: { load: 2 } },
    ]);
    expect(new Set(all.map(({ id }) => id))).toEqual(new Set([server.instanceId, client.instanceId]));
    expect(await client.serviceStats('nobody', 200)).toEqual([]);
    const status = await new Promise((resolve) => {
      client.requestStream(SUBJECTS.status(server.instanceId), new Uint8Array(0), (reply) =>
        resolve(reply && unpackMessage(reply.data)),
      );
    });
    expect(status).toEqual({ load: 1 });
  });
});

function workItem(id: string, overrides: Partial<WorkItem> = {}): WorkItem {
  return {
    id,
    model: 'm',
    tokenIds: [1, 2, 3],
    maxTokens: 5,
    sampling: { temperature: 0.5, topP: 0.9, topK: 0, minP: 0, seed: 7 },
    stop: ['x'],
    logprobs: null,
    ignoreEos: false,
    priority: 0,
    deadlineAtMs: null,
    encoding: 'json',
    submittedAtMs: 1,
    ...overrides,
  };
}

/** Nobody may purge them. */
async function renewStreams(bus: Bus): Promise<void> {
  const manager = await bus.connection.jetstreamManager();
  for (const { name } of Object.values(STREAMS)) await manager.streams.delete(name).catch(() => false);
  await ensureStreams(bus);
}

async function numQueued(bus: Bus): Promise<number> {
  const manager = await bus.connection.jetstreamManager();
  return (await manager.streams.info(STREAMS.work.name)).state.messages;
}

describe('the work queue', () => {
  let gateway: WorkQueue;
  let executor: WorkQueue;
  let unreadable: LaminaError[];

  beforeEach(async () => {
    await renewStreams(client);
    gateway = new WorkQueue(client);
    executor = new WorkQueue(server);
    unreadable = [];
  });

  function lease(waitMs = 5000): Promise<WorkLease | undefined> {
    return executor.lease(waitMs, (error) => unreadable.push(error));
  }

  async function leased(): Promise<WorkLease> {
    const work = await lease();
    if (work === undefined) throw new Error('nothing in the queue');
    return work;
  }

  test('an item is leased as it was submitted, stays until it is completed, and is offered once', async () => {
    const item = workItem('once', { tokenIds: [0, 70_000], logprobs: 3, deadlineAtMs: 1.5, encoding: 'msgpack' });
    await gateway.submit(item);
    const work = await leased();
    expect([work.item, work.deliveryCount]).toEqual([item, 1]);
    work.renew();
    expect(await lease(LEASE_MS)).toBeUndefined();
    expect(await numQueued(client)).toBe(1);
    work.complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
  });

  test('items come in the order of their submission, spread over who asks', async () => {
    const sequences = await Promise.all(['q1', 'q2', 'q3'].map((id) => gateway.submit(workItem(id))));
    expect(sequences).toEqual([sequences[0], sequences[0]! + 1, sequences[0]! + 2]);
    const other = new WorkQueue(client);
    const first = await leased();
    const second = await other.lease(LEASE_MS, () => undefined);
    const third = await leased();
    expect([first, second, third].map((work) => work?.item.id)).toEqual(['q1', 'q2', 'q3']);
    for (const work of [first, second, third]) work?.complete();
  });

  test('a released item is offered again at once, and counted', async () => {
    await gateway.submit(workItem('released'));
    for (const count of [1, 2]) {
      const work = await leased();
      expect([work.item.id, work.deliveryCount]).toEqual(['released', count]);
      work.release();
    }
    const last = await leased();
    expect([last.item.id, last.deliveryCount]).toEqual(['released', 3]);
    last.complete();
    expect(await lease(LEASE_MS)).toBeUndefined();
  });

  test('an item whose executor died is offered again when its lease lapses; a renewed one is not', async () => {
    const manager = await client.connection.jetstreamManager();
    const { durableConsumer, name } = STREAMS.work;
    const waitNs = async (): Promise<number> => (await manager.consumers.info(name, durableConsumer)).config.ack_wait!;
    expect(await waitNs()).toBe(ACK_WAIT_MS * 1e6);
    // Half a minute is too long for a test.
    await manager.consumers.update(name, durableConsumer, { ack_wait: 600e6 });
    await gateway.submit(workItem('renewed'));
    await gateway.submit(workItem('lapsed'));
    const renewed = await leased();
    const lapsed = await leased();
    const renewing = setInterval(() => renewed.renew(), 100);
    const again = await leased();
    expect([again.item.id, again.deliveryCount]).toEqual([lapsed.item.id, 2]);
    again.complete();
    expect(await lease(LEASE_MS)).toBeUndefined();
    clearInterval(renewing);
    renewed.complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    await ensureStreams(client);
    expect(await waitNs()).toBe(ACK_WAIT_MS * 1e6);
  });

  test('an id that waits or was completed a short time ago is not taken again', async () => {
    await gateway.submit(workItem('twice'));
    const again = { code: 'duplicate_id', message: expect.stringContaining('"twice"') };
    await expect(gateway.submit(workItem('twice'))).rejects.toMatchObject(again);
    expect(await numQueued(client)).toBe(1);
    (await leased()).complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    await expect(gateway.submit(workItem('twice'))).rejects.toMatchObject(again);
    expect(await lease(LEASE_MS)).toBeUndefined();
  });

  test('an id that waits is not taken again, however long it has waited', async () => {
    // Stored without a message id, so the server's window of duplicates does not know it.
    client.publish(SUBJECTS.work('old'), packMessage(workItem('old')));
    await eventually(async () => ((await numQueued(client)) === 1 ? true : undefined));
    await expect(gateway.submit(workItem('old'))).rejects.toMatchObject({ code: 'duplicate_id' });
    (await leased()).complete();
  });

  test('a full queue is overloaded, and takes prompts again when one is done', async () => {
    const manager = await client.connection.jetstreamManager();
    await manager.streams.update(STREAMS.work.name, { max_msgs: 1 });
    await gateway.submit(workItem('full-1'));
    await expect(gateway.submit(workItem('full-2'))).rejects.toMatchObject({ code: 'overloaded', retryable: true });
    (await leased()).complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    await gateway.submit(workItem('full-3'));
    (await leased()).complete();
    await ensureStreams(client);
    expect((await manager.streams.info(STREAMS.work.name)).config.max_msgs).toBeGreaterThan(1);
  });

  test('a prompt that is larger than a message is refused for good', async () => {
    const tokenIds = new Array<number>(client.maxPayloadBytes).fill(1);
    await expect(gateway.submit(workItem('large', { tokenIds }))).rejects.toMatchObject({
      code: 'invalid_request',
      message: expect.stringContaining('max_payload'),
    });
  });

  test('an unreadable item is reported and removed, and the next one is leased', async () => {
    const bad = [Buffer.from('hello'), packMessage({ id: 'bad' }), packMessage(workItem('bad', { tokenIds: [] }))];
    for (const body of bad) {
      client.publish(SUBJECTS.work('bad'), body);
      await eventually(async () => ((await numQueued(client)) === 1 ? true : undefined));
      expect(await lease()).toBeUndefined();
      await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    }
    expect(unreadable.map(({ code }) => code)).toEqual(bad.map(() => 'protocol_violation'));
    await gateway.submit(workItem('good'));
    (await leased()).complete();
  });

  test('an item is there from its submission to its completion, leased or not', async () => {
    expect(await gateway.has('there')).toBe(false);
    await gateway.submit(workItem('there'));
    expect(await gateway.has('there')).toBe(true);
    const work = await leased();
    expect(await gateway.has('there')).toBe(true);
    work.complete();
    await eventually(async () => ((await gateway.has('there')) ? undefined : true));
  });

  test('without the stream a prompt is not taken', async () => {
    const manager = await client.connection.jetstreamManager();
    await manager.streams.delete(STREAMS.work.name);
    await expect(gateway.submit(workItem('nowhere'))).rejects.toMatchObject({ code: 'unavailable' });
    await ensureStreams(client);
  });
});

function token(id: string, index: number, finishReason: TokenMessage['finish_reason'] = null): TokenMessage {
  return { id, index, token: index + 10, text: `t${index}`, finish_reason: finishReason };
}

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
    expect(await reader.stored('mixed')).toEqual({ tokens: [], lastSequence: 0 });
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
    // Who follows sees what the stream refused, too.
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

async function freePort(): Promise<number> {
  const holder = createServer().listen(0, '127.0.0.1');
  await once(holder, 'listening');
  const { port } = Object(holder.address());
  holder.close();
  await once(holder, 'close');
  return Number(port);
}

test.each(['SIGKILL', 'SIGSTOP'] as const)(
  'a connection closes soon after its server had %s',
  async (signal) => {
    const silent = await startNatsServer();
    const bus = await connect(silent.url);
    bus.subscribe('anything', () => undefined);
    process.kill(silent.pid!, signal);
    const startedMs = performance.now();
    await bus.close();
    expect([bus.isClosed, performance.now() - startedMs < 4_000]).toEqual([true, true]);
    // A server that does not listen to SIGTERM ends too.
    await silent.stop();
  },
  20_000,
);

describe('the server', () => {
  test('streams are bounded, and many services may make them at once', async () => {
    const manager = await client.connection.jetstreamManager();
    for (const { name } of Object.values(STREAMS)) await manager.streams.delete(name).catch(() => false);
    await Promise.all([client, server, client, server].map(ensureStreams));
    for (const { name } of Object.values(STREAMS)) {
      const { config } = await manager.streams.info(name);
      expect(Math.max(config.max_msgs, config.max_bytes)).toBeGreaterThan(0);
      expect(config.storage).toBe('file');
    }
  });

  test('nobody purges a stream or deletes a message, also where the stream was made without that', async () => {
    const manager = await client.connection.jetstreamManager();
    for (const { name } of Object.values(STREAMS)) await manager.streams.delete(name).catch(() => false);
    await manager.streams.add({ name: STREAMS.tokens.name, subjects: [...STREAMS.tokens.subjects] });
    const tokens = new TokenStream(client, () => undefined);
    const sequence = await store(tokens, [token('kept', 0)]);
    await ensureStreams(client);
    for (const { name } of Object.values(STREAMS)) {
      await expect(manager.streams.purge(name)).rejects.toThrow(/purge not permitted/);
      await expect(manager.streams.deleteMessage(name, 1)).rejects.toThrow(/delete not permitted/);
      await expect(manager.streams.update(name, { deny_purge: false })).rejects.toThrow(/can not cancel deny purge/);
    }
    expect((await tokens.endOf('kept'))?.sequence).toBe(sequence);
  });

  test('without JetStream it is nats_unreachable, with what to do', async () => {
    const port = await freePort();
    const plain = spawn('nats-server', ['-a', '127.0.0.1', '-p', String(port)], { stdio: 'ignore' });
    const exited = once(plain, 'exit');
    const bus = await connect(`nats://127.0.0.1:${port}`);
    await expect(ensureStreams(bus)).rejects.toMatchObject({
      code: 'nats_unreachable',
      message: expect.stringContaining('start it with -js'),
    });
    await bus.close();
    plain.kill();
    await exited;
  });

  test('that is not there is nats_unreachable, after the time given and not before', async () => {
    const port = await freePort();
    const startMs = performance.now();
    const urls = [`nats://u:s3cret@127.0.0.1:${port}`, 'nats://u:s3c@ret@no-such-host.invalid:4222'];
    for (const url of urls) {
      const failed = Bus.connect({ url, name: 'test', connectTimeoutMs: 500 }, { onError: () => {} });
      await expect(failed).rejects.toMatchObject({
        code: 'nats_unreachable',
        message: expect.stringMatching(/no nats-server answers at nats:\/\/\*\*\*@(?!.*ret@)/),
      });
    }
    expect(performance.now() - startMs).toBeGreaterThan(1000);
  });

  test('that starts again on its port and store is found again, with its streams, leases and subscriptions', async () => {
    const storeDir = mkdtempSync(join(tmpdir(), 'lamina-store-'));
    try {
      const first = await startNatsServer({ storeDir });
      const bus = await connect(first.url);
      const changes: string[] = [];
      bus.onStatus((type) => changes.push(type));
      await ensureStreams(bus);
      await announce(bus);
      bus.serve(ENDPOINTS.free, () => ({}));
      const events: number[] = [];
      bus.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => events.push(freeBlocks));
      const queue = new WorkQueue(bus);
      const tokens = new TokenStream(bus, () => undefined);
      await queue.submit(workItem('kept-1'));
      await queue.submit(workItem('kept-2'));
      const held = await queue.lease(LEASE_MS, () => undefined);
      await store(tokens, [token('kept-1', 0)]);

      await first.stop();
      await eventually(() => (changes.includes('disconnect') ? true : undefined));
      const second = await startNatsServer({ storeDir, port: first.port });
      await eventually(() => (changes.includes('reconnect') ? true : undefined));

      bus.publishEvent(EVENTS.capacityFreed, { freeBlocks: 7 });
      await eventually(() => events[0]);
      expect(events).toEqual([7]);
      expect(await bus.request(ENDPOINTS.free, { requestId: 'a', executorId: 'e' }, TIMEOUT)).toEqual({});
      expect([await numQueued(bus), (await tokens.endOf('kept-1'))?.isComplete]).toEqual([2, false]);
      held!.complete();
      const next = await queue.lease(5000, () => undefined);
      expect([next?.item.id, next?.deliveryCount]).toEqual(['kept-2', 1]);
      next!.complete();
      await eventually(async () => ((await numQueued(bus)) === 0 ? true : undefined));
      const { lastSequence } = await tokens.stored('kept-1');
      expect(await tokens.append([token('kept-1', 0)], 'json', 0)).toBe(lastSequence);
      expect(await store(tokens, [token('kept-1', 1, 'stop')])).toBeGreaterThan(lastSequence);
      const seen: number[] = [];
      await tokens.replay('kept-1', (data) => seen.push(...decodeTokens(data).map(({ index }) => index)));
      await eventually(() => (seen.includes(1) ? true : undefined));
      expect(seen).toEqual([0, 1]);
      await bus.close();
      await second.stop();
    } finally {
      rmSync(storeDir, { recursive: true, force: true });
    }
  });
});
