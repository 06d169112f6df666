/** The gateway over a real nats-server; the test plays its clients, the kv-manager and the executor. */
import { type Bus, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import {
  decodeTokens,
  type KvStatus,
  packMessage,
  STREAMS,
  SUBJECTS,
  TOKENS_HEADER,
  type TokenMessage,
} from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { answerWith, dropEnded, GATEWAY_FLAGS, messagesIn, playKvManager, READY, token } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';
import { store } from './store-answer.ts';

let nats: NatsServer;
let bus: Bus;
let gateway: InProcessService;
let queue: WorkQueue;
let tokens: TokenStream;
let kvStatus: KvStatus;
let statusRequests: number;

beforeAll(async () => {
  nats = await startNatsServer();
  bus = await connect(nats.url);
  await playKvManager(bus, () => {
    statusRequests++;
    return kvStatus;
  });
});
afterAll(async () => {
  await bus.close();
  await nats.stop();
});
beforeEach(async () => {
  kvStatus = READY;
  statusRequests = 0;
  await start();
});
afterEach(async () => {
  await gateway.stop();
  expect(await workMessages()).toBe(0);
});

async function start(flags: readonly string[] = []): Promise<void> {
  gateway = await startInProcess('gateway', startGateway, nats.url, [...GATEWAY_FLAGS, ...flags]);
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
}

interface Client {
  readonly messages: TokenMessage[];
  readonly bodies: Uint8Array[];
  readonly isFinal: () => boolean;
  readonly final: () => Promise<TokenMessage>;
}

/** An ordinary client: a body and a reply subject. */
function ask(body: Uint8Array | object | string): Client {
  const data = body instanceof Uint8Array ? body : Buffer.from(typeof body === 'string' ? body : JSON.stringify(body));
  const messages: TokenMessage[] = [];
  const bodies: Uint8Array[] = [];
  let finals = 0;
  const subscription = bus.requestStream(SUBJECTS.generate, data, (reply) => {
    if (reply === undefined) throw new Error('no gateway');
    bodies.push(reply.data);
    messages.push(...decodeTokens(reply.data));
    if (reply.header('Lamina-Final') === 'true') finals++;
  });
  return {
    messages,
    bodies,
    isFinal: () => finals > 0,
    final: async () => {
      await eventually(() => (finals > 0 ? true : undefined));
      await bus.flush();
      subscription.unsubscribe();
      expect(finals).toBe(1);
      return messages.at(-1)!;
    },
  };
}

function lease(): Promise<WorkLease> {
  return eventually(() => queue.lease(1_000, () => undefined));
}

const answer = (work: WorkLease, count?: number): Promise<void> => answerWith(tokens, work, count);
const workMessages = (): Promise<number> => messagesIn(bus, 'work');

describe('a prompt', () => {
  test('as text is tokenized, completed with defaults and answered in JSON', async () => {
    const client = ask('Once upon a time');
    const work = await lease();
    expect(work.item).toMatchObject({
      model: 'lamina-tiny',
      maxTokens: 200,
      sampling: { temperature: 0.7, topP: 0.9, topK: 0, minP: 0 },
      encoding: 'json',
      logprobs: null,
    });
    expect(work.item.tokenIds.length).toBeGreaterThan(2);
    await answer(work);
    await client.final();
    expect(client.messages.map((message) => message.index)).toEqual([0, 1, 2]);
    expect(JSON.parse(Buffer.from(client.bodies[0]!).toString())).toEqual(token(work.item.id, 0));
  });

  test('as JSON keeps its id and its options', async () => {
    const client = ask({
      id: 'mine-1',
      messages: [{ role: 'user', content: 'Hello' }],
      max_tokens: 5,
      temperature: 0,
      seed: 9,
      stop: 'end',
      logprobs: true,
      ignore_eos: true,
      priority: 3,
    });
    const work = await lease();
    expect(work.item).toMatchObject({
      id: 'mine-1',
      maxTokens: 5,
      sampling: { temperature: 0, seed: 9 },
      stop: ['end'],
      logprobs: 0,
      ignoreEos: true,
      priority: 3,
    });
    await answer(work, 1);
    expect(await client.final()).toMatchObject({ id: 'mine-1', finish_reason: 'length' });
  });

  test('as msgpack is answered in msgpack, with the same bytes as the executor wrote', async () => {
    const client = ask(packMessage({ token_ids: [1, 2, 3], max_tokens: 2 }));
    const work = await lease();
    expect(work.item).toMatchObject({ tokenIds: [1, 2, 3], encoding: 'msgpack' });
    await answer(work, 2);
    await client.final();
    expect(Buffer.from(client.bodies[0]!)).toEqual(Buffer.from(packMessage(token(work.item.id, 0))));
  });

  test('costs the kv-manager no question of its own when many come', async () => {
    const clients = Array.from({ length: 20 }, () => ask('Hi'));
    for (let count = 0; count < 20; count++) await answer(await lease(), 1);
    for (const client of clients) await client.final();
    expect(statusRequests).toBe(1);
  });
});

describe('bad input is answered at once', () => {
  const long = Array.from({ length: 1_100 }, () => 1);
  const cases: readonly (readonly [string, Uint8Array | object | string, string, string])[] = [
    ['an empty body', '', 'invalid_request', 'empty'],
    ['neither text nor msgpack', Uint8Array.of(0xff, 0xfe, 0x80), 'invalid_request', 'UTF-8'],
    ['broken JSON', '{"prompt": ', 'invalid_request', 'JSON'],
    ['an empty prompt', { prompt: '' }, 'invalid_request', 'prompt'],
    ['no prompt', { max_tokens: 3 }, 'invalid_request', 'exactly one'],
    ['two prompts', { prompt: 'a', token_ids: [1] }, 'invalid_request', 'exactly one'],
    ['a wrong type', { prompt: 5 }, 'invalid_request', 'prompt'],
    ['an unknown field', { prompt: 'a', max_token: 3 }, 'invalid_request', 'max_token'],
    ['max_tokens of 0', { prompt: 'a', max_tokens: 0 }, 'invalid_request', 'max_tokens'],
    ['a negative temperature', { prompt: 'a', temperature: -1 }, 'invalid_request', 'temperature'],
    ['a temperature of NaN', packMessage({ prompt: 'a', temperature: Number.NaN }), 'invalid_request', 'temperature'],
    ['an unpaired surrogate', { prompt: '\ud800' }, 'invalid_request', 'surrogate'],
    ['a token beyond the vocabulary', { token_ids: [1_024] }, 'invalid_request', 'token_ids.0'],
    ['an unknown model', { prompt: 'a', model: 'gpt' }, 'unknown_model', 'lamina-tiny'],
    ['an id with a wildcard', { prompt: 'a', id: 'a.*' }, 'invalid_request', 'id'],
    ['an id with a larger wildcard', { prompt: 'a', id: '>' }, 'invalid_request', 'id'],
    ['a prompt longer than the context', { token_ids: long }, 'context_length_exceeded', '1100'],
    ['text longer than any context', 'a'.repeat(900_000), 'context_length_exceeded', '900000'],
    ['max_tokens beyond the context', { token_ids: [1], max_tokens: 1_024 }, 'context_length_exceeded', 'at most 1023'],
    ['more than the KV of the cluster', { token_ids: [1], max_tokens: 600 }, 'kv_capacity_exceeded', '512'],
  ];
  test.for(cases)('%s', async ([, body, code, hint]) => {
    const client = ask(body);
    const last = await client.final();
    expect(last).toMatchObject({ index: 0, token: null, text: '', finish_reason: 'error', error: { code } });
    expect(last.error?.message).toContain(hint);
    expect(client.messages).toHaveLength(1);
    expect(gateway.running.stats?.()).toMatchObject({ openRequests: 0 });
  });

  test('with the id of the request, in its encoding', async () => {
    const json = ask({ id: 'bad-1', prompt: 'a', max_tokens: 0 });
    expect(await json.final()).toMatchObject({ id: 'bad-1' });
    const msgpack = ask(packMessage({ id: 'bad-2', prompt: 'a', max_tokens: 0 }));
    expect(await msgpack.final()).toMatchObject({ id: 'bad-2' });
    expect(msgpack.bodies[0]![0]).not.toBe(0x7b);
  });
});

describe('a cluster that cannot answer', () => {
  test.for([
    ['has no executor', { executors: [] }, 'dense-executor'],
    ['serves another model', { executors: [{ executorId: 'e', modelId: 'big' }] }, 'big'],
    ['has no shard', { shards: [] }, 'attention-shard'],
  ] as const)('because it %s', async ([, change, hint]) => {
    kvStatus = {
      ...READY,
      ...change,
      executors: [...('executors' in change ? change.executors : READY.executors)],
      shards: 'shards' in change ? [] : READY.shards,
    };
    const last = await ask('Hi').final();
    expect(last.error).toMatchObject({ code: 'unavailable', message: expect.stringContaining(hint) });
    kvStatus = READY;
    const client = ask('Hi');
    await answer(await lease(), 1);
    expect((await client.final()).finish_reason).toBe('length');
  });
});

describe('the same id twice is one request:', () => {
  const TOKENS = [token('same', 0), token('same', 1), token('same', 2, 'length')];

  test('both get the whole answer, and so does who asks when it has ended', async () => {
    const first = ask({ id: 'same', prompt: 'Hi' });
    const work = await lease();
    const second = ask({ id: 'same', prompt: 'Hi' });
    await answer(work);
    await Promise.all([first.final(), second.final()]);
    const third = ask({ id: 'same', prompt: 'Hi' });
    await third.final();
    for (const { messages } of [first, second, third]) expect(messages).toEqual(TOKENS);
    expect(await workMessages()).toBe(0);
  });

  test('at the same moment', async () => {
    const clients = Array.from({ length: 8 }, () => ask({ id: 'same-1', prompt: 'Hi' }));
    await answer(await lease());
    for (const client of clients) {
      await client.final();
      expect(client.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
    }
    expect(await queue.lease(1_000, () => undefined)).toBeUndefined();
  });

  test('each in the encoding that it asks in', async () => {
    const json = ask({ id: 'same-2', prompt: 'Hi' });
    const work = await lease();
    const msgpack = ask(packMessage({ id: 'same-2', prompt: 'Hi' }));
    await answer(work, 1);
    await Promise.all([json.final(), msgpack.final()]);
    expect(json.bodies[0]![0]).toBe(0x7b);
    expect(Buffer.from(msgpack.bodies[0]!)).toEqual(Buffer.from(packMessage(token('same-2', 0, 'length'))));
  });

  test('another gateway takes up what a dead one had', async () => {
    const lost = ask({ id: 'same-3', prompt: 'Hi' });
    const work = await lease();
    await store(tokens, [token('same-3', 0)]);
    await eventually(() => (lost.messages.length === 1 ? true : undefined));
    await gateway.crash();
    await start();
    const again = ask({ id: 'same-3', prompt: 'Hi' });
    await store(tokens, [token('same-3', 1)]);
    await store(tokens, [token('same-3', 2, 'stop')]);
    work.complete();
    await again.final();
    expect(again.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
    expect(lost.isFinal()).toBe(false);
  });

  test('the rest of an answer whose work item was lost is computed', async () => {
    await store(tokens, [token('same-4', 0), token('same-4', 1)]);
    const client = ask({ id: 'same-4', prompt: 'Hi' });
    const work = await lease();
    expect(work.item.isContinued).toBe(true);
    await store(tokens, [token('same-4', 2, 'stop')]);
    work.complete();
    await client.final();
    expect(client.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
  });
});

describe('tokens', () => {
  test('that are published twice or lost on the way reach the client once and in order', async () => {
    const client = ask({ id: 'lossy', prompt: 'Hi' });
    const work = await lease();
    const stored = [0, 1, 2].map((index) => token('lossy', index));
    await store(tokens, stored.slice(0, 1));
    const unasked = (index: number): void => {
      const data = Buffer.from(JSON.stringify(token('lossy', index)));
      bus.publishWithHeaders(SUBJECTS.tokens('lossy'), data, { [TOKENS_HEADER]: `${index}-${index}` });
    };
    // Only the stream sees these two: as if the connection had dropped them.
    const manager = await bus.connection.jetstreamManager();
    await eventually(() => (client.messages.length === 1 ? true : undefined));
    unasked(0);
    await manager.streams.info(STREAMS.tokens.name);
    unasked(3);
    await store(tokens, stored.slice(1));
    await store(tokens, [token('lossy', 3)]);
    await store(tokens, [token('lossy', 4, 'stop')]);
    work.complete();
    await client.final();
    expect(client.messages.map((message) => message.index)).toEqual([0, 1, 2, 3, 4]);
  });
});

describe('cancel', () => {
  test('of a queued request is answered by the gateway; who takes its item is refused', async () => {
    const client = ask({ id: 'queued', prompt: 'Hi' });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    bus.publish(SUBJECTS.cancel('queued'), new Uint8Array(0));
    expect(await client.final()).toMatchObject({ id: 'queued', index: 0, token: null, finish_reason: 'cancelled' });
    await expect(tokens.append([token('queued', 0)], 'json', 0)).rejects.toMatchObject({ code: 'duplicate_id' });
    expect(await dropEnded(queue, tokens)).toMatchObject({ id: 'queued', finish_reason: 'cancelled' });
    const replayed: Uint8Array[] = [];
    const replay = await tokens.replay('queued', (data) => replayed.push(data));
    await eventually(() => (replayed.length === 1 ? true : undefined));
    replay.unsubscribe();
  });

  test('of a running request is answered by the executor', async () => {
    const client = ask({ id: 'running', prompt: 'Hi' });
    const work = await lease();
    await store(tokens, [token('running', 0)]);
    bus.publish(SUBJECTS.cancel('running'), new Uint8Array(0));
    await store(tokens, [{ ...token('running', 1, 'cancelled'), token: null, text: '' }]);
    work.complete();
    expect(await client.final()).toMatchObject({ index: 1, finish_reason: 'cancelled' });
  });

  test('of a request that no gateway relays and no executor has is answered all the same', async () => {
    const lost = ask({ id: 'stray', prompt: 'Hi' });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    await gateway.crash();
    await start();
    bus.publish(SUBJECTS.cancel('stray'), new Uint8Array(0));
    await eventually(async () => ((await tokens.endOf('stray'))?.isComplete ? true : undefined));
    expect(await dropEnded(queue, tokens)).toMatchObject({ id: 'stray', finish_reason: 'cancelled' });
    expect(lost.isFinal()).toBe(false);
  });

  test('of an unknown or malformed id does nothing', async () => {
    bus.publish(SUBJECTS.cancel('nobody'), new Uint8Array(0));
    bus.publish(SUBJECTS.cancel('caf\u00e9'), new Uint8Array(0));
    const client = ask('Hi');
    await answer(await lease(), 1);
    expect((await client.final()).finish_reason).toBe('length');
  });
});

test('a deadline that passes in the queue is answered', async () => {
  const client = ask({ prompt: 'Hi', deadline_ms: 1_000 });
  await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
  const last = await client.final();
  expect(last.error?.code).toBe('deadline_exceeded');
  expect(await dropEnded(queue, tokens)).toEqual(last);
});

test('more prompts than may be open are refused as overloaded', async () => {
  await gateway.stop();
  await start(['--max-open-requests', '2']);
  const open = [ask('Hi'), ask('Hi')];
  const works = [await lease(), await lease()];
  expect((await ask('Hi').final()).error?.code).toBe('overloaded');
  for (const work of works) await answer(work, 1);
  for (const client of open) await client.final();
});

test('a prompt that nobody could be answered for is not run', async () => {
  bus.publish(SUBJECTS.generate, Buffer.from('Hi'));
  await bus.flush();
  await ask('').final();
  expect(await workMessages()).toBe(0);
});

test('a gateway that stops answers what it took first', async () => {
  const client = ask('Hi');
  const work = await lease();
  const stopped = gateway.stop();
  await answer(work);
  expect((await client.final()).finish_reason).toBe('length');
  await stopped;
  await start();
});

test('HTTP tells health, metrics and what is not there', async () => {
  const { httpPort } = Object(gateway.running.stats?.());
  const url = `http://127.0.0.1:${httpPort}`;
  const health = await fetch(`${url}/health`);
  expect([health.status, await health.json()]).toEqual([
    200,
    { status: 'ok', model: 'lamina-tiny', executors: 1, shards: 1, freeBlocks: 30 },
  ]);
  kvStatus = { ...READY, shards: [] };
  const unwell = await fetch(`${url}/health`);
  expect([unwell.status, await unwell.json()]).toEqual([
    503,
    { status: 'unavailable', reason: 'no attention-shard is ready' },
  ]);
  const missing = await fetch(`${url}/nothing`);
  expect([missing.status, await missing.json()]).toMatchObject([404, { error: { code: 'invalid_request' } }]);
  expect((await fetch(`${url}/metrics`)).status).toBe(200);
});

test('a port that is taken is said in one line', async () => {
  const { httpPort } = Object(gateway.running.stats?.());
  const second = startInProcess('gateway', startGateway, nats.url, [
    ...GATEWAY_FLAGS.slice(0, 2),
    '--http-port',
    String(httpPort),
  ]);
  await expect(second).rejects.toMatchObject({
    code: 'address_in_use',
    message: expect.stringContaining('--http-port'),
  });
});
