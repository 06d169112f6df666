/** The OpenAI API of the gateway over a real nats-server; the test plays its clients, the kv-manager and the executor. */

import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Bus, type Subscription, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { type KvStatus, SUBJECTS } from '@lamina/protocol';
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
let url: string;

beforeAll(async () => {
  nats = await startNatsServer();
  bus = await connect(nats.url);
  await playKvManager(bus, () => kvStatus);
});
afterAll(async () => {
  await bus.close();
  await nats.stop();
});
beforeEach(async () => {
  kvStatus = READY;
  await start();
});
afterEach(() => gateway.stop());

async function start(flags: readonly string[] = []): Promise<void> {
  gateway = await startInProcess('gateway', startGateway, nats.url, [...GATEWAY_FLAGS, ...flags]);
  url = `http://127.0.0.1:${Object(gateway.running.stats?.()).httpPort}`;
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
}

async function restart(flags: readonly string[]): Promise<void> {
  await gateway.stop();
  await start(flags);
}

const lease = (): Promise<WorkLease> => eventually(() => queue.lease(1_000, () => undefined));

function post(path: string, body: unknown, init: RequestInit = {}): Promise<Response> {
  return fetch(`${url}${path}`, {
    method: 'POST',
    ...init,
    headers: { 'content-type': 'application/json', ...init.headers },
    body: typeof body === 'string' ? body : JSON.stringify(body),
  });
}

interface ServerEvent {
  readonly id: string | undefined;
  readonly data: string;
}

async function* eventsOf(response: Response): AsyncGenerator<ServerEvent> {
  expect(response.headers.get('content-type')).toContain('text/event-stream');
  let text = '';
  for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
    text += chunk;
    const parts = text.split('\n\n');
    text = parts.pop() ?? '';
    for (const part of parts) yield { id: /^id: (.*)$/m.exec(part)?.[1], data: /^data: (.*)$/m.exec(part)?.[1] ?? '' };
  }
}

async function allEvents(response: Response): Promise<ServerEvent[]> {
  const events: ServerEvent[] = [];
  for await (const event of eventsOf(response)) events.push(event);
  return events;
}

const ASK = { model: 'lamina-tiny', messages: [{ role: 'user', content: 'Hello' }] };
const usage = { prompt_tokens: 4, completion_tokens: 2, total_tokens: 6 };

async function answerWithUsage(work: WorkLease): Promise<void> {
  const { id } = work.item;
  const logprobs =
    work.item.logprobs === null ? {} : { logprob: -0.5, top_logprobs: [{ token: 5, text: 't0', logprob: -0.5 }] };
  await store(tokens, [{ ...token(id, 0), ...logprobs }]);
  await store(tokens, [{ ...token(id, 1, 'stop'), ...logprobs, usage }]);
  work.complete();
}

describe('a completion', () => {
  test('of a chat is one object', async () => {
    const asked = post('/v1/chat/completions', {
      ...ASK,
      max_completion_tokens: 9,
      temperature: 0,
      stop: null,
      user: 'me',
    });
    const work = await lease();
    expect(work.item).toMatchObject({ maxTokens: 9, sampling: { temperature: 0 } });
    await answerWithUsage(work);
    const response = await asked;
    expect(response.headers.get('lamina-request-id')).toBe(work.item.id);
    expect(await response.json()).toMatchObject({
      id: work.item.id,
      object: 'chat.completion',
      model: 'lamina-tiny',
      choices: [{ index: 0, message: { role: 'assistant', content: 't0t1' }, finish_reason: 'stop', logprobs: null }],
      usage,
    });
  });

  test('of a prompt has log-probabilities', async () => {
    const asked = post('/v1/completions', { prompt: ['Once'], logprobs: 1, max_tokens: 2 });
    const work = await lease();
    expect(work.item).toMatchObject({ logprobs: 1, maxTokens: 2 });
    await answerWithUsage(work);
    expect(await (await asked).json()).toMatchObject({
      object: 'text_completion',
      choices: [
        {
          text: 't0t1',
          finish_reason: 'stop',
          logprobs: {
            tokens: ['t0', 't1'],
            token_logprobs: [-0.5, -0.5],
            top_logprobs: [{ t0: -0.5 }, { t0: -0.5 }],
            text_offset: [0, 2],
          },
        },
      ],
    });
  });

  test('as a stream is an event per token, whose id is its index', async () => {
    const asked = post('/v1/chat/completions', { ...ASK, stream: true, stream_options: { include_usage: true } });
    await answerWithUsage(await lease());
    const events = await allEvents(await asked);
    expect(events.map(({ id }) => id)).toEqual(['0', '1', undefined, undefined]);
    expect(events.at(-1)?.data).toBe('[DONE]');
    const chunks = events.slice(0, -1).map(({ data }) => JSON.parse(data));
    expect(chunks.map(({ choices }) => choices[0])).toMatchObject([
      { delta: { role: 'assistant', content: 't0' }, finish_reason: null },
      { delta: { content: 't1' }, finish_reason: 'stop' },
      undefined,
    ]);
    expect(chunks.at(-1)).toMatchObject({ object: 'chat.completion.chunk', choices: [], usage });
  });

  test('is the text of the official client: token ids and our own fields, too', async () => {
    const asked = post('/v1/completions', { prompt: [1, 2, 3], top_k: 3, ignore_eos: true, priority: 2, top_p: 0 });
    const work = await lease();
    expect(work.item).toMatchObject({
      tokenIds: [1, 2, 3],
      ignoreEos: true,
      priority: 2,
      sampling: { topK: 3, topP: 1e-6 },
    });
    await answerWith(tokens, work, 1);
    expect((await asked).status).toBe(200);
  });
});

describe('a client that comes back', () => {
  test('gets the rest at another gateway, after its own died', async () => {
    const asked = post('/v1/chat/completions', { ...ASK, stream: true }, { headers: { 'Idempotency-Key': 'mine' } });
    const work = await lease();
    expect(work.item.id).toBe('mine');
    await store(tokens, [token('mine', 0), token('mine', 1)]);
    const events = eventsOf(await asked);
    await events.next();
    const { value } = await events.next();
    expect(value?.id).toBe('1');
    await gateway.crash();
    expect((await events.next()).value).toMatchObject({ id: undefined, data: expect.stringContaining('unavailable') });
    await start();
    const again = post(
      '/v1/chat/completions',
      { ...ASK, stream: true },
      { headers: { 'Idempotency-Key': 'mine', 'Last-Event-ID': '1' } },
    );
    const following = fetch(`${url}/v1/requests/mine/events`, { headers: { 'Last-Event-ID': '0' } });
    await store(tokens, [token('mine', 2)]);
    await store(tokens, [token('mine', 3, 'stop')]);
    work.complete();
    expect((await allEvents(await again)).map(({ id }) => id)).toEqual(['2', '3', undefined]);
    const raw = await allEvents(await following);
    expect(raw.map(({ id }) => id)).toEqual(['1', '2', '3', undefined]);
    expect(JSON.parse(raw[0]!.data)).toEqual(token('mine', 1));
    const whole = await post('/v1/chat/completions', ASK, { headers: { 'Idempotency-Key': 'mine' } });
    expect(await whole.json()).toMatchObject({ choices: [{ message: { content: 't0t1t2t3' } }] });
  });

  test('finds its request running although it had hung up, if it named it', async () => {
    const cancels: string[] = [];
    const listening = bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => cancels.push(subject));
    const abort = new AbortController();
    const asked = post(
      '/v1/completions',
      { prompt: 'Hi', stream: true },
      { signal: abort.signal, headers: { 'Idempotency-Key': 'named' } },
    );
    const work = await lease();
    abort.abort();
    await expect(asked).rejects.toThrow();
    const again = post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': 'named' } });
    await answerWith(tokens, work);
    expect(await (await again).json()).toMatchObject({ choices: [{ text: 't0t1t2' }] });
    expect(cancels).toEqual([]);
    listening.unsubscribe();
  });

  test('only to read, and hangs up, is counted no longer; the request goes on', async () => {
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': 'read' } });
    const work = await lease();
    const openRequests = (): number => Object(gateway.running.stats?.()).openRequests;
    const abort = new AbortController();
    const { signal } = abort;
    const readers = [1, 2, 3].map(() => fetch(`${url}/v1/requests/read/events`, { signal }));
    await eventually(() => (openRequests() === 4 ? true : undefined));
    abort.abort();
    for (const reader of readers) await expect(reader).rejects.toThrow();
    await eventually(() => (openRequests() === 1 ? true : undefined));
    await answerWith(tokens, work);
    expect(await (await asked).json()).toMatchObject({ choices: [{ text: 't0t1t2' }] });
  });

  test('to read a durable prompt gets its answer', async () => {
    const { seq } = await bus.connection.jetstream().publish(SUBJECTS.prompts, Buffer.from('Hi'));
    await answerWith(tokens, await lease(), 2);
    const response = await fetch(`${url}/v1/requests/p${seq}/events`);
    expect((await allEvents(response)).map(({ id }) => id)).toEqual(['0', '1', undefined]);
    expect(await (await fetch(`${url}/v1/requests/p${seq}`)).json()).toEqual({ id: `p${seq}`, state: 'ended' });
  });
});

describe('a request is cancelled', () => {
  test('by a client that hangs up', async () => {
    const abort = new AbortController();
    const asked = post('/v1/completions', { prompt: 'Hi', stream: true }, { signal: abort.signal });
    await eventually(async () => ((await messagesIn(bus, 'work')) === 1 ? true : undefined));
    abort.abort();
    await expect(asked).rejects.toThrow();
    await eventually(() => (Object(gateway.running.stats?.()).openRequests === 0 ? true : undefined));
    expect((await dropEnded(queue, tokens)).finish_reason).toBe('cancelled');
  });

  test('by a reader who then hangs up, though no executor has it', async () => {
    const { seq } = await bus.connection.jetstream().publish(SUBJECTS.prompts, Buffer.from('Hi'));
    await eventually(async () => ((await messagesIn(bus, 'work')) === 1 ? true : undefined));
    const abort = new AbortController();
    const reading = fetch(`${url}/v1/requests/p${seq}/events`, { signal: abort.signal });
    await eventually(() => (Object(gateway.running.stats?.()).openRequests === 1 ? true : undefined));
    const cancelled = await fetch(`${url}/v1/requests/p${seq}`, { method: 'DELETE' });
    expect(cancelled.status).toBe(202);
    abort.abort();
    await expect(reading).rejects.toThrow();
    await eventually(async () => ((await tokens.stored(`p${seq}`)).lastSequence > 0 ? true : undefined));
    expect(await dropEnded(queue, tokens)).toMatchObject({ id: `p${seq}`, finish_reason: 'cancelled' });
  });

  test('by DELETE', async () => {
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': 'deleted' } });
    await eventually(async () => ((await messagesIn(bus, 'work')) === 1 ? true : undefined));
    const cancelled = await fetch(`${url}/v1/requests/deleted`, { method: 'DELETE' });
    expect([cancelled.status, await cancelled.json()]).toEqual([202, { id: 'deleted', state: 'cancelling' }]);
    expect(await (await asked).json()).toMatchObject({ choices: [{ text: '', finish_reason: 'cancelled' }] });
    expect((await dropEnded(queue, tokens)).id).toBe('deleted');
    const unknown = await fetch(`${url}/v1/requests/nobody`, { method: 'DELETE' });
    expect([unknown.status, await unknown.json()]).toMatchObject([404, { error: { code: 'unknown_request' } }]);
  });
});

describe('a mistake', () => {
  test.for([
    ['broken JSON', '/v1/completions', '{', 400, 'invalid_request', null],
    ['an array', '/v1/completions', [], 400, 'invalid_request', null],
    ['an unknown field', '/v1/completions', { prompt: 'a', x: 1 }, 400, 'invalid_request', null],
    ['what is not supported', '/v1/completions', { prompt: 'a', n: 2 }, 400, 'invalid_request', 'n'],
    ['no messages', '/v1/chat/completions', {}, 400, 'invalid_request', 'messages'],
    ['a bad temperature', '/v1/completions', { prompt: 'a', temperature: -1 }, 400, 'invalid_request', 'temperature'],
    ['another model', '/v1/completions', { prompt: 'a', model: 'gpt' }, 404, 'unknown_model', null],
    ['too many tokens', '/v1/completions', { prompt: 'a', max_tokens: 5000 }, 400, 'context_length_exceeded', null],
    ['another path', '/v1/embeddings', {}, 404, 'invalid_request', null],
  ] as const)('such as %s has the shape of OpenAI', async ([, path, body, status, code, param]) => {
    const response = await post(path, body);
    const type = 'invalid_request_error';
    expect([response.status, await response.json()]).toEqual([
      status,
      { error: { message: expect.any(String), type, param, code } },
    ]);
  });

  test('also when a stream was asked for', async () => {
    const response = await post('/v1/completions', { prompt: 'a', stream: true, max_tokens: 5000 });
    expect([response.status, await response.json()]).toMatchObject([
      400,
      { error: { code: 'context_length_exceeded' } },
    ]);
  });

  test('of the model in a stream that has begun is its last event', async () => {
    const asked = post('/v1/completions', { prompt: 'a', stream: true });
    const work = await lease();
    const { id } = work.item;
    await store(tokens, [token(id, 0)]);
    const error = { code: 'numeric_error' as const, message: 'NaN' };
    await store(tokens, [{ ...token(id, 1, 'error'), token: null, text: '', error }]);
    work.complete();
    const events = await allEvents(await asked);
    expect(JSON.parse(events[1]!.data)).toMatchObject({ error: { code: 'numeric_error', type: 'server_error' } });
  });

  test('because nobody can answer says when to try again', async () => {
    kvStatus = { ...READY, executors: [] };
    const response = await post('/v1/completions', { prompt: 'a' });
    expect([response.status, response.headers.get('retry-after')]).toEqual([503, '1']);
  });

  test('of size is refused before it is read', async () => {
    await restart(['--http-body-bytes', '1k']);
    const response = await post('/v1/completions', { prompt: 'a'.repeat(2_000) });
    expect([response.status, await response.json()]).toMatchObject([413, { error: { code: 'invalid_request' } }]);
  });
});

test('models are listed', async () => {
  expect(await (await fetch(`${url}/v1/models`)).json()).toMatchObject({
    object: 'list',
    data: [{ id: 'lamina-tiny' }],
  });
  expect((await fetch(`${url}/v1/models/lamina-tiny`)).status).toBe(200);
  expect((await fetch(`${url}/v1/models/owner/gpt`)).status).toBe(404);
});

describe('API keys', () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'lamina-keys-'));
  });
  afterEach(() => rmSync(directory, { recursive: true, force: true }));

  function keysFile(text: string): string {
    const path = join(directory, 'keys');
    writeFileSync(path, text);
    return path;
  }

  test('are asked for on every path of /v1, and say which client it is', async () => {
    const path = keysFile('# ours\nalice:sk-0123456789abcdef\n\nbob: sk-fedcba9876543210\n');
    await restart(['--api-keys-file', path, '--max-open-per-client', '1']);
    for (const authorization of ['', 'Bearer sk-0123456789abcdeg', 'sk-0123456789abcdef']) {
      for (const path of ['/v1/models', '/v1/requests/x', '/v1/requests/x/events']) {
        const response = await fetch(`${url}${path}`, { headers: { authorization } });
        expect([response.status, await response.json()]).toMatchObject([401, { error: { code: 'unauthorized' } }]);
      }
      expect((await post('/v1/completions', { prompt: 'a' }, { headers: { authorization } })).status).toBe(401);
    }
    const as = (key: string): Promise<Response> =>
      post('/v1/completions', { prompt: 'a' }, { headers: { authorization: `Bearer ${key}` } });
    const alice = as('sk-0123456789abcdef');
    const work = await lease();
    const second = await as('sk-0123456789abcdef');
    expect([second.status, second.headers.get('retry-after')]).toEqual([429, '1']);
    const bob = as('sk-fedcba9876543210');
    await answerWith(tokens, await lease(), 1);
    expect((await bob).status).toBe(200);
    await answerWith(tokens, work, 1);
    expect((await alice).status).toBe(200);
  });

  test('keep clients apart: neither sees, cancels nor shares what another has under the same id', async () => {
    await restart(['--api-keys-file', keysFile('alice:sk-0123456789abcdef\nbob:sk-fedcba9876543210\n')]);
    const [alice, bob] = ['sk-0123456789abcdef', 'sk-fedcba9876543210'].map((key) => `Bearer ${key}`);
    const ask = (authorization: string, prompt: string, id?: string): Promise<Response> =>
      post(
        '/v1/completions',
        { prompt },
        { headers: { authorization, ...(id !== undefined && { 'Idempotency-Key': id }) } },
      );
    const of = (authorization: string, path: string, method = 'GET'): Promise<Response> =>
      fetch(`${url}/v1/requests/${path}`, { method, headers: { authorization } });
    const ofAlice = ask(alice!, 'Hi', 'shared');
    const aliceWork = await lease();
    // What a client chose is in no subject: it cannot meet an id that somebody chose on NATS.
    expect(aliceWork.item.id).not.toContain('shared');
    for (const [path, method] of [['shared'], ['shared/events'], ['shared', 'DELETE']] as const) {
      const response = await of(bob!, path, method);
      expect([response.status, Object(await response.json()).error.code]).toEqual([404, 'unknown_request']);
    }
    const direct = await of(bob!, aliceWork.item.id);
    expect(direct.status).toBe(404);
    expect(await (await of(alice!, 'shared')).json()).toEqual({ id: 'shared', state: 'working' });
    const ofBob = ask(bob!, 'Hello you', 'shared');
    const bobWork = await lease();
    expect(bobWork.item.tokenIds).not.toEqual(aliceWork.item.tokenIds);
    await answerWith(tokens, bobWork, 1);
    await answerWith(tokens, aliceWork, 3);
    for (const [asked, text] of [
      [ofAlice, 't0t1t2'],
      [ofBob, 't0'],
    ] as const) {
      const response = await asked;
      expect(response.headers.get('lamina-request-id')).toBe('shared');
      expect(await response.json()).toMatchObject({ id: 'shared', choices: [{ text }] });
    }
    // Each comes back for its own, also under an id that the gateway made.
    expect(await (await ask(alice!, 'Hi', 'shared')).json()).toMatchObject({ choices: [{ text: 't0t1t2' }] });
    const events = await (await of(bob!, 'shared/events')).text();
    expect(events).toContain('"id":"shared"');
    expect(events).not.toContain('"index":1');
    const unnamed = ask(alice!, 'Hi');
    await answerWith(tokens, await lease(), 1);
    const { id } = Object(await (await unnamed).json());
    expect(await (await of(alice!, id)).json()).toEqual({ id, state: 'ended' });
    expect((await of(bob!, id)).status).toBe(404);
  });

  test.for(['', '# nothing\n', 'alice sk-0123456789abcdef', 'alice:short', 'a.b:sk-0123456789abcdef'])(
    'in a file like "%s" end the start, and are not shown',
    async (text) => {
      const started = startInProcess('gateway', startGateway, nats.url, [
        ...GATEWAY_FLAGS,
        '--api-keys-file',
        keysFile(text),
      ]);
      await expect(started).rejects.toMatchObject({
        code: 'config_invalid',
        message: expect.not.stringContaining('0123456789abcdef'),
      });
    },
  );
});

describe('what is not let in is answered before its body is there', () => {
  /** Sends headers that promise a body, and nothing of it. */
  async function answerTo(path: string, headers: readonly string[] = [], method = 'POST'): Promise<string> {
    const { hostname, port } = new URL(url);
    const socket = createConnection({ host: hostname, port: Number(port) });
    const lines = [`${method} ${path} HTTP/1.1`, 'Host: x', 'Content-Type: application/json', ...headers];
    socket.write(`${[...lines, 'Content-Length: 4000000'].join('\r\n')}\r\n\r\n{"prompt": "`);
    try {
      const [head] = await once(socket, 'data', { signal: AbortSignal.timeout(5_000) });
      return String(head);
    } finally {
      socket.destroy();
    }
  }

  test('without its API key', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'lamina-keys-'));
    writeFileSync(join(directory, 'keys'), 'alice:sk-0123456789abcdef\n');
    await restart(['--api-keys-file', join(directory, 'keys')]);
    rmSync(directory, { recursive: true });
    for (const [path, method] of [
      ['/v1/completions'],
      ['/v1/chat/completions'],
      ['/v1/requests/x', 'DELETE'],
    ] as const) {
      const answer = await answerTo(path, ['Authorization: Bearer sk-0123456789abcdeg'], method);
      expect(answer).toMatch(/^HTTP\/1.1 401 [\s\S]*"code":"unauthorized"/);
    }
    // The whole of a large body does not keep its sender from the answer.
    const response = await post('/v1/completions', { prompt: 'a'.repeat(4_000_000) });
    expect([response.status, await response.json()]).toMatchObject([401, { error: { code: 'unauthorized' } }]);
  });

  test('beyond its rate, and each is counted once', async () => {
    await restart(['--requests-per-minute', '3']);
    kvStatus = { ...READY, executors: [] };
    for (let count = 0; count < 3; count++) expect((await post('/v1/completions', { prompt: 'a' })).status).toBe(503);
    const answer = await answerTo('/v1/completions');
    expect(answer).toMatch(/^HTTP\/1.1 429 [\s\S]*retry-after: \d+\r\n[\s\S]*"type":"rate_limit_error"/i);
    expect(await answerTo('/v1/chat/completions', ['Lamina-Client: a.b'])).toMatch(/^HTTP\/1.1 400 /);
  });

  test('on a path where nothing is served', async () => {
    expect(await answerTo('/v1/embeddings')).toMatch(/^HTTP\/1.1 404 [\s\S]*nothing is served at POST/);
  });
});

test('connections beyond the bound are closed, and taken again when others have gone', async () => {
  await restart(['--max-open-requests', '1']);
  const { hostname, port } = new URL(url);
  const open: Socket[] = [];
  const connectOne = async (): Promise<Socket> => {
    const socket = createConnection({ host: hostname, port: Number(port) });
    socket.on('error', () => undefined);
    await once(socket, 'connect');
    open.push(socket);
    return socket;
  };
  for (let count = 0; count < 4_097; count++) await connectOne();
  const refused = await connectOne();
  await once(refused, 'close', { signal: AbortSignal.timeout(5_000) });
  for (const socket of open) socket.destroy();
  await eventually(() =>
    fetch(`${url}/v1/models`).then(
      ({ status }) => status,
      () => undefined,
    ),
  );
}, 60_000);

test('metrics are collected once for all who ask within a second', async () => {
  let asked = 0;
  const listening = bus.subscribe(SUBJECTS.metrics, () => asked++);
  await bus.flush();
  const texts = await Promise.all(
    Array.from({ length: 20 }, () => fetch(`${url}/metrics`).then((response) => response.text())),
  );
  await bus.flush();
  expect(asked).toBe(1);
  expect(new Set(texts).size).toBe(1);
  listening.unsubscribe();
});

test('a client that asks too often is told when to come again; another is not', async () => {
  await restart(['--requests-per-minute', '2']);
  kvStatus = { ...READY, executors: [] };
  const as = (client: string): Promise<Response> =>
    post('/v1/completions', { prompt: 'a' }, { headers: { 'Lamina-Client': client } });
  expect([(await as('a')).status, (await as('a')).status]).toEqual([503, 503]);
  const refused = await as('a');
  const { error } = Object(await refused.json());
  expect([refused.status, error.code, error.type]).toEqual([429, 'overloaded', 'rate_limit_error']);
  expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(20);
  expect((await as('b')).status).toBe(503);
});

describe('questions about requests and cancellations', () => {
  const cancelled: string[] = [];
  let listening: Subscription;
  beforeEach(() => {
    cancelled.length = 0;
    listening = bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => cancelled.push(subject));
  });
  afterEach(() => listening.unsubscribe());
  const ask = (path: string, method = 'GET', client = 'a'): Promise<Response> =>
    fetch(`${url}/v1/requests/${path}`, { method, headers: { 'Lamina-Client': client } });

  test('beyond their rate are told when to come again, and then are heard; prompts and other clients are not touched', async () => {
    await restart(['--follow-ups-per-minute', '12', '--requests-per-minute', '1']);
    const headers = { 'Lamina-Client': 'a', 'Idempotency-Key': 'polled' };
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers });
    await eventually(async () => ((await messagesIn(bus, 'work')) === 1 ? true : undefined));
    const polls = await Promise.all(Array.from({ length: 12 }, () => ask('polled')));
    expect(new Set(polls.map(({ status }) => status))).toEqual(new Set([200]));
    let retryAfterSeconds = 0;
    for (const [path, method] of [['polled'], ['polled/events'], ['polled', 'DELETE']] as const) {
      const refused = await ask(path, method);
      const { error } = Object(await refused.json());
      expect([refused.status, error.code, error.message]).toEqual([
        429,
        'overloaded',
        'more than 12 questions about requests and cancellations a minute of "a"',
      ]);
      retryAfterSeconds = Number(refused.headers.get('retry-after'));
      expect([1, 2, 3, 4, 5]).toContain(retryAfterSeconds);
    }
    expect(await (await ask('polled', 'GET', 'b')).json()).toEqual({ id: 'polled', state: 'working' });
    expect(cancelled).toEqual([]);
    await new Promise((resolve) => setTimeout(resolve, retryAfterSeconds * 1_000));
    expect((await ask('polled', 'DELETE')).status).toBe(202);
    expect(await (await asked).json()).toMatchObject({ choices: [{ finish_reason: 'cancelled' }] });
    await dropEnded(queue, tokens);
  }, 20_000);

  test('of many requests at once are all heard by default', async () => {
    const ids = Array.from({ length: 200 }, (_, index) => `many-${index}`);
    const answers = await Promise.all(ids.map((id) => ask(id, 'DELETE')));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([404]));
    await eventually(() => (cancelled.length >= ids.length ? true : undefined));
    expect(cancelled.sort()).toEqual(ids.map((id) => SUBJECTS.cancel(id)).sort());
  });
});

test('pages of other origins may not call it unless that was configured', async () => {
  const headers = { origin: 'https://page.example' };
  expect((await fetch(`${url}/v1/models`, { headers })).headers.get('access-control-allow-origin')).toBeNull();
  await restart(['--http-cors-origin', 'https://page.example']);
  const preflight = await fetch(`${url}/v1/completions`, { method: 'OPTIONS', headers });
  expect([preflight.status, preflight.headers.get('access-control-allow-origin')]).toEqual([204, headers.origin]);
  const other = await fetch(`${url}/v1/models`, { headers: { origin: 'https://other.example' } });
  expect(other.headers.get('access-control-allow-origin')).toBeNull();
});
