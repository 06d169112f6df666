/** Who may call the gateway's HTTP server, how often and from where, over a real nats-server. */
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { SUBJECTS } from '@lamina/protocol';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { GATEWAY_FLAGS, READY } from './gateway-bench.ts';
import { post, url } from './http-client.ts';
import { eventually, startInProcess } from './in-process.ts';
import { answer, bus, kv, lease, nats, restart, useGateway } from './running-gateway.ts';

useGateway();

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
        const response = await fetch(`${url()}${path}`, { headers: { authorization } });
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
    await answer(await lease(), 1);
    expect((await bob).status).toBe(200);
    await answer(work, 1);
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
      fetch(`${url()}/v1/requests/${path}`, { method, headers: { authorization } });
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
    await answer(bobWork, 1);
    await answer(aliceWork, 3);
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
    await answer(await lease(), 1);
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
    const { hostname, port } = new URL(url());
    const socket = createConnection({ host: hostname, port: Number(port) });
    // The answer may be followed by a reset: the body never came.
    socket.on('error', () => undefined);
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
    kv.status = { ...READY, executors: [] };
    for (let count = 0; count < 3; count++) expect((await post('/v1/completions', { prompt: 'a' })).status).toBe(503);
    const answer = await answerTo('/v1/completions');
    expect(answer).toMatch(/^HTTP\/1.1 429 [\s\S]*retry-after: \d+\r\n[\s\S]*"type":"rate_limit_error"/i);
    expect(await answerTo('/v1/chat/completions', ['Lamina-Client: a.b'])).toMatch(/^HTTP\/1.1 400 /);
  });

  test('on a path where nothing is served', async () => {
    expect(await answerTo('/v1/embeddings')).toMatch(/^HTTP\/1.1 404 [\s\S]*nothing is served at POST/);
  });

  test('before a page may call it, which is asked without a key', async () => {
    expect(await answerTo('/v1/completions', [], 'OPTIONS')).toMatch(/^HTTP\/1.1 404 /);
    await restart(['--http-cors-origin', '*']);
    const answer = await answerTo('/v1/completions', ['Origin: https://page.example'], 'OPTIONS');
    expect(answer).toMatch(/^HTTP\/1.1 204 [\s\S]*access-control-allow-origin: \*\r\n/i);
    expect(answer).toMatch(/access-control-allow-headers: Authorization, /i);
    // What is no JSON is no error either: nobody looks at it.
    const whole = await fetch(`${url()}/v1/completions`, {
      method: 'OPTIONS',
      headers: { 'content-type': 'application/json' },
      body: '{'.repeat(1_000),
    });
    expect(whole.status).toBe(204);
  });
});

test('connections beyond the bound are closed, and taken again when others have gone', async () => {
  await restart(['--max-open-requests', '1']);
  const { hostname, port } = new URL(url());
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
    fetch(`${url()}/v1/models`).then(
      ({ status }) => status,
      () => undefined,
    ),
  );
}, 60_000);

test('a client that asks too often is told when to come again; another is not', async () => {
  await restart(['--requests-per-minute', '2']);
  kv.status = { ...READY, executors: [] };
  const as = (client: string): Promise<Response> =>
    post('/v1/completions', { prompt: 'a' }, { headers: { 'Lamina-Client': client } });
  expect([(await as('a')).status, (await as('a')).status]).toEqual([503, 503]);
  const refused = await as('a');
  const { error } = Object(await refused.json());
  expect([refused.status, error.code, error.type]).toEqual([429, 'overloaded', 'rate_limit_error']);
  expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(20);
  expect((await as('b')).status).toBe(503);
});

test('pages of other origins may not call it unless that was configured', async () => {
  const headers = { origin: 'https://page.example' };
  expect((await fetch(`${url()}/v1/models`, { headers })).headers.get('access-control-allow-origin')).toBeNull();
  await restart(['--http-cors-origin', 'https://page.example']);
  const preflight = await fetch(`${url()}/v1/completions`, { method: 'OPTIONS', headers });
  expect([preflight.status, preflight.headers.get('access-control-allow-origin')]).toEqual([204, headers.origin]);
  const other = await fetch(`${url()}/v1/models`, { headers: { origin: 'https://other.example' } });
  expect(other.headers.get('access-control-allow-origin')).toBeNull();
});

test('metrics are collected once for all who ask within a second', async () => {
  let asked = 0;
  const listening = bus.subscribe(SUBJECTS.metrics, () => asked++);
  await bus.flush();
  const texts = await Promise.all(
    Array.from({ length: 20 }, () => fetch(`${url()}/metrics`).then((response) => response.text())),
  );
  await bus.flush();
  expect(asked).toBe(1);
  expect(new Set(texts).size).toBe(1);
  listening.unsubscribe();
});
