/** Requests of HTTP clients that go on: who comes back for the rest, who cancels, who asks how far it is; over a real nats-server. */
import type { Subscription } from '@lamina/bus';
import { SUBJECTS } from '@lamina/protocol';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { serverEvents } from '../server-events.ts';
import { dropEnded, token } from './gateway-bench.ts';
import { allEvents, post, url } from './http-client.ts';
import { eventually } from './in-process.ts';
import {
  answer,
  bus,
  gateway,
  lease,
  openRequests,
  queue,
  restart,
  start,
  tokens,
  useGateway,
  workMessages,
} from './running-gateway.ts';
import { store } from './store-answer.ts';

useGateway();

const ASK = { model: 'lamina-tiny', messages: [{ role: 'user', content: 'Hello' }] };

describe('a client that comes back', () => {
  test('gets the rest at another gateway, after its own died', async () => {
    const asked = post('/v1/chat/completions', { ...ASK, stream: true }, { headers: { 'Idempotency-Key': 'mine' } });
    const work = await lease();
    expect(work.item.id).toBe('mine');
    await store(tokens, [token('mine', 0), token('mine', 1)]);
    const events = serverEvents(await asked);
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
    const following = fetch(`${url()}/v1/requests/mine/events`, { headers: { 'Last-Event-ID': '0' } });
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

  test('with the last token hears how the answer ended, and no token twice', async () => {
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': 'had' } });
    await answer(await lease());
    await (await asked).json();
    const headers = { 'Idempotency-Key': 'had', 'Last-Event-ID': '2' };
    const [completion] = await allEvents(await post('/v1/completions', { prompt: 'Hi', stream: true }, { headers }));
    expect(JSON.parse(completion!.data)).toMatchObject({ choices: [{ text: '', finish_reason: 'length' }] });
    const [raw, end] = await allEvents(await fetch(`${url()}/v1/requests/had/events`, { headers }));
    expect(JSON.parse(raw!.data)).toMatchObject({
      id: 'had',
      index: 2,
      token: null,
      text: '',
      finish_reason: 'length',
    });
    expect(end!.data).toBe('[DONE]');
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
    await answer(work);
    expect(await (await again).json()).toMatchObject({ choices: [{ text: 't0t1t2' }] });
    expect(cancels).toEqual([]);
    listening.unsubscribe();
  });

  test('only to read, and hangs up, is counted no longer; the request goes on', async () => {
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': 'read' } });
    const work = await lease();
    const abort = new AbortController();
    const { signal } = abort;
    const readers = [1, 2, 3].map(() => fetch(`${url()}/v1/requests/read/events`, { signal }));
    await eventually(() => (openRequests() === 4 ? true : undefined));
    abort.abort();
    for (const reader of readers) await expect(reader).rejects.toThrow();
    await eventually(() => (openRequests() === 1 ? true : undefined));
    await answer(work);
    expect(await (await asked).json()).toMatchObject({ choices: [{ text: 't0t1t2' }] });
  });

  test('to read a durable prompt gets its answer', async () => {
    const { seq } = await bus.connection.jetstream().publish(SUBJECTS.prompts, Buffer.from('Hi'));
    await answer(await lease(), 2);
    const response = await fetch(`${url()}/v1/requests/p${seq}/events`);
    expect((await allEvents(response)).map(({ id }) => id)).toEqual(['0', '1', undefined]);
    expect(await (await fetch(`${url()}/v1/requests/p${seq}`)).json()).toEqual({ id: `p${seq}`, state: 'ended' });
  });
});

describe('a request is cancelled', () => {
  test('by a client that hangs up', async () => {
    const abort = new AbortController();
    const asked = post('/v1/completions', { prompt: 'Hi', stream: true }, { signal: abort.signal });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    abort.abort();
    await expect(asked).rejects.toThrow();
    await eventually(() => (openRequests() === 0 ? true : undefined));
    expect((await dropEnded(queue, tokens)).finish_reason).toBe('cancelled');
  });

  test('by a reader who then hangs up, though no executor has it', async () => {
    const { seq } = await bus.connection.jetstream().publish(SUBJECTS.prompts, Buffer.from('Hi'));
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    const abort = new AbortController();
    const reading = fetch(`${url()}/v1/requests/p${seq}/events`, { signal: abort.signal });
    await eventually(() => (openRequests() === 1 ? true : undefined));
    const cancelled = await fetch(`${url()}/v1/requests/p${seq}`, { method: 'DELETE' });
    expect(cancelled.status).toBe(202);
    abort.abort();
    await expect(reading).rejects.toThrow();
    await eventually(async () => ((await tokens.stored(`p${seq}`)).lastSequence > 0 ? true : undefined));
    expect(await dropEnded(queue, tokens)).toMatchObject({ id: `p${seq}`, finish_reason: 'cancelled' });
  });

  test('by DELETE', async () => {
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': 'deleted' } });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    const cancelled = await fetch(`${url()}/v1/requests/deleted`, { method: 'DELETE' });
    expect([cancelled.status, await cancelled.json()]).toEqual([202, { id: 'deleted', state: 'cancelling' }]);
    expect(await (await asked).json()).toMatchObject({ choices: [{ text: '', finish_reason: 'cancelled' }] });
    expect((await dropEnded(queue, tokens)).id).toBe('deleted');
    const unknown = await fetch(`${url()}/v1/requests/nobody`, { method: 'DELETE' });
    expect([unknown.status, await unknown.json()]).toMatchObject([404, { error: { code: 'unknown_request' } }]);
  });
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
    fetch(`${url()}/v1/requests/${path}`, { method, headers: { 'Lamina-Client': client } });

  test('beyond their rate are told when to come again, and then are heard; prompts and other clients are not touched', async () => {
    await restart(['--follow-ups-per-minute', '12', '--requests-per-minute', '1']);
    const headers = { 'Lamina-Client': 'a', 'Idempotency-Key': 'polled' };
    const asked = post('/v1/completions', { prompt: 'Hi' }, { headers });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
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
