import { ENDPOINTS, EVENTS, packMessage, SUBJECTS, unpackMessage } from '@lamina/protocol';
import { ERROR_CODES, type ErrorCode, isErrorCode, LaminaError } from '@lamina/tensor';
import { describe, expect, test } from 'vitest';
import { announce, client, errors, server, TIMEOUT, useBus } from './bus-bench.ts';
import { eventually } from './in-process.ts';

useBus();

describe('request and reply', () => {
  const CALL = { requestId: 'a', executorId: 'e', numTokens: 5, maxTokens: 9, deliveryCount: 1 };

  test('a typed body goes over and a typed reply comes back', async () => {
    await announce();
    const seen: unknown[] = [];
    server.service.serve(ENDPOINTS.allocate, async (body) => {
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
    const kinds = ['', '.test-service', `.test-service.${server.service.instanceId}`];
    const asked = [
      ENDPOINTS.allocate.subject,
      SUBJECTS.status(server.service.instanceId),
      ...['PING', 'INFO', 'STATS'].flatMap((verb) => kinds.map((kind) => `$SRV.${verb}${kind}`)),
    ];
    for (const reply of ['lamina.v1.work.x', '$JS.API.STREAM.PURGE.LAMINA_WORK']) {
      const published: string[] = [];
      client.subscribe(reply, (message) => published.push(message.subject));
      errors.length = 0;
      for (const subject of asked) client.publish(subject, packMessage(CALL), reply);
      await client.request(ENDPOINTS.allocate, CALL, TIMEOUT);
      expect(published).toEqual([]);
      expect(errors).toEqual(asked.map((subject) => ({ code: 'protocol_violation', subject })));
    }
    expect(seen).toHaveLength(3);
    // And is answered where it listens.
    for (const subject of asked.slice(2))
      expect(await client.requestAll(subject, 200), subject).toEqual([expect.any(Uint8Array)]);
  });

  const retryAfter: Partial<Record<ErrorCode, number>> = { unavailable: 1_500, overloaded: 0 };
  test('every error code, its message and when to try again survive, diagnostics and causes do not', async () => {
    await announce();
    server.service.serve(ENDPOINTS.free, ({ requestId }) => {
      if (isErrorCode(requestId))
        throw new LaminaError(requestId, `it was ${requestId}`, {
          diagnostics: { a: 1 },
          retryAfterMs: retryAfter[requestId],
        });
      throw new TypeError('secret');
    });
    await server.flush();
    const ask = (requestId: string): Promise<unknown> =>
      client.request(ENDPOINTS.free, { requestId, executorId: 'e' }, TIMEOUT).catch((error: unknown) => error);
    const codes = Object.keys(ERROR_CODES) as ErrorCode[];
    const answers = (await Promise.all(codes.map(ask))) as LaminaError[];
    expect(
      answers.map(({ code, message, diagnostics, retryAfterMs }) => ({ code, message, diagnostics, retryAfterMs })),
    ).toEqual(
      codes.map((code) => ({ code, message: `it was ${code}`, diagnostics: {}, retryAfterMs: retryAfter[code] })),
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
    server.service.serve(ENDPOINTS.extend, () => ({ managerEpoch: 'm', blocks: [] }));
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
    server.service.serve(ENDPOINTS.allocate, () => ({ managerEpoch: 'm', blocks }));
    await server.flush();
    await expect(client.request(ENDPOINTS.allocate, CALL, TIMEOUT)).rejects.toMatchObject({ code: 'internal' });
    const body = { executorId: 'e', modelId: 'm'.repeat(client.maxPayloadBytes), spec: Object(), originIds: [1] };
    await expect(client.request(ENDPOINTS.executorHeartbeat, body, TIMEOUT)).rejects.toMatchObject({
      code: 'invalid_request',
      message: expect.stringContaining('max_payload'),
    });
  });

  test('a service that withdrew is not there any more, its connection is', async () => {
    await announce();
    server.service.serve(ENDPOINTS.kvStatus, () => {
      throw new LaminaError('overloaded', '');
    });
    const events: number[] = [];
    server.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => events.push(freeBlocks));
    await server.flush();
    await expect(client.request(ENDPOINTS.kvStatus, {}, TIMEOUT)).rejects.toMatchObject({ code: 'overloaded' });
    await server.service.withdraw();
    await server.flush();
    await expect(client.request(ENDPOINTS.kvStatus, {}, TIMEOUT)).rejects.toMatchObject({ code: 'unavailable' });
    client.publishEvent(EVENTS.capacityFreed, { freeBlocks: 3 });
    await eventually(() => events[0]);
    expect(events).toEqual([3]);
  });

  test('endpoints need an announced service', () => {
    expect(() => server.service.serve(ENDPOINTS.kvStatus, () => Object())).toThrow(LaminaError);
    expect(() => server.service.serveRaw('raw', 'raw', 'q', () => undefined)).toThrow(LaminaError);
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
    expect(new Set(all.map(({ id }) => id))).toEqual(new Set([server.service.instanceId, client.service.instanceId]));
    expect(await client.serviceStats('nobody', 200)).toEqual([]);
    const status = await new Promise((resolve) => {
      client.requestStream(SUBJECTS.status(server.service.instanceId), new Uint8Array(0), (reply) =>
        resolve(reply && unpackMessage(reply.data)),
      );
    });
    expect(status).toEqual({ load: 1 });
  });
});
