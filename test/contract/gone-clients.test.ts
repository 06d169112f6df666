/** Clients that go away in the middle of an answer, over NATS and HTTP, on a real nats-server. */
import { Bus } from '@lamina/bus';
import { STREAMS, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { connect as connectToNats, createInbox, type NatsConnection } from 'nats';
import { expect, test } from 'vitest';
import { GONE_AFTER_MS } from '../../services/gateway/src/unheard-replies.ts';
import { serverEvents } from '../server-events.ts';
import { token } from './gateway-bench.ts';
import { allEvents, post } from './http-client.ts';
import { eventually } from './in-process.ts';
import {
  answer,
  ask,
  bus,
  gateway,
  lease,
  nats,
  openRequests,
  restart,
  tokens,
  useGateway,
} from './running-gateway.ts';
import { store } from './store-answer.ts';

useGateway();

interface Listener {
  readonly connection: NatsConnection;
  readonly requestId: string;
  readonly texts: string[];
  /** Stops listening, and stays connected. */
  unsubscribe(): void;
  end(): Promise<void>;
}

/** An ordinary client of its own connection, whose request an executor has taken; the first token is there. */
async function answering(body: object): Promise<Listener> {
  const connection = await connectToNats({ servers: nats.url });
  const inbox = createInbox();
  const texts: string[] = [];
  const subscription = connection.subscribe(inbox, {
    callback: (_, message) => texts.push(message.json<TokenMessage>().text),
  });
  connection.publish(SUBJECTS.generate, JSON.stringify(body), { reply: inbox });
  const work = await lease();
  const requestId = work.item.id;
  await store(tokens, [token(requestId, 0)]);
  await eventually(() => (texts.length === 1 ? true : undefined));
  return {
    connection,
    requestId,
    texts,
    unsubscribe: () => subscription.unsubscribe(),
    end: async () => {
      work.complete();
      await connection.close();
    },
  };
}

test('a client that goes away has its request cancelled, unless it named it; who listens on, or is back soon, has not', async () => {
  const cancels = new Set<string>();
  const listening = bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => cancels.add(subject));
  const closes = await answering({ prompt: 'Hi' });
  const unsubscribes = await answering({ prompt: 'Hi' });
  const stays = await answering({ prompt: 'Hi' });
  const returns = await answering({ prompt: 'Hi' });
  const named = await answering({ prompt: 'Hi', id: 'named' });
  const all = [closes, unsubscribes, stays, returns, named];
  const expected = [closes, unsubscribes].map(({ requestId }) => SUBJECTS.cancel(requestId));
  await closes.connection.close();
  await named.connection.close();
  const startMs = performance.now();
  let cancelledMs = 0;
  unsubscribes.unsubscribe();
  await returns.connection.reconnect();
  let index = 0;
  while (performance.now() - startMs < GONE_AFTER_MS + 2_500) {
    index++;
    for (const { requestId } of all)
      if (!cancels.has(SUBJECTS.cancel(requestId))) await store(tokens, [token(requestId, index)]);
    await new Promise((resolve) => setTimeout(resolve, 250));
    if (cancels.size >= expected.length) cancelledMs ||= performance.now() - startMs;
  }
  expect(cancels).toEqual(new Set(expected));
  expect(cancelledMs).toBeGreaterThan(GONE_AFTER_MS);
  expect(stays.texts).toEqual(Array.from({ length: index + 1 }, (_, at) => `t${at}`));
  // Nothing is kept for those that have gone: the two that are open are `stays` and `returns`.
  await eventually(() => (openRequests() === 2 ? true : undefined));
  for (const { requestId } of all) await store(tokens, [token(requestId, index + 1, 'stop')]).catch(() => undefined);
  await eventually(() => (openRequests() === 0 ? true : undefined), 10_000);
  expect(stays.texts.at(-1)).toBe(`t${index + 1}`);
  const again = ask({ prompt: 'Hi', id: 'named' });
  await again.final();
  expect(again.messages.map(({ text }) => text)).toEqual(stays.texts);
  for (const each of all) await each.end();
  listening.unsubscribe();
}, 60_000);

test('a client that hangs up and resumes by HTTP again and again has one place, and what it named goes on', async () => {
  await restart(['--max-open-per-client', '1']);
  const numConsumers = async (): Promise<number> => {
    const manager = await bus.connection.jetstreamManager();
    return (await manager.streams.info(STREAMS.tokens.name)).state.consumer_count;
  };
  const resume = (afterIndex: number, signal: AbortSignal | null = null): Promise<Response> =>
    post(
      '/v1/completions',
      { prompt: 'Hi', stream: true },
      { signal, headers: { 'Idempotency-Key': 'resumed', 'Last-Event-ID': afterIndex < 0 ? '' : String(afterIndex) } },
    );
  const cancels: string[] = [];
  const listening = bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => cancels.push(subject));
  const hangUp = new AbortController();
  const asked = resume(-1, hangUp.signal);
  const work = await lease();
  await store(tokens, [token('resumed', 0)]);
  await serverEvents(await asked).next();
  hangUp.abort();
  for (let index = 1; index < 5; index++) {
    await eventually(() => (openRequests() === 0 ? true : undefined));
    const abort = new AbortController();
    const resumed = resume(index - 1, abort.signal);
    await store(tokens, [token('resumed', index)]);
    expect((await serverEvents(await resumed).next()).value?.id).toBe(String(index));
    abort.abort();
  }
  await eventually(() => (openRequests() === 0 ? true : undefined));
  // The server removes a consumer without a reader after 5 s.
  await eventually(async () => ((await numConsumers()) === 0 ? true : undefined), 10_000);
  await store(tokens, [token('resumed', 5, 'stop')]);
  work.complete();
  expect((await allEvents(await resume(3))).map(({ id }) => id)).toEqual(['4', '5', undefined]);
  expect(cancels).toEqual([]);
  listening.unsubscribe();
});

test.each([true, false])(
  'a client that hangs up before its named request is in the work queue leaves it to go there, streamed: %s',
  async (stream) => {
    await restart(['--max-waiting-work', '1']);
    const id = `waits-${stream}`;
    const before = ask({ prompt: 'Hi', id: `before-${stream}` });
    await eventually(() => (openRequests() === 1 ? true : undefined));
    const abort = new AbortController();
    const { signal } = abort;
    const asked = post('/v1/completions', { prompt: 'Hi', stream }, { signal, headers: { 'Idempotency-Key': id } });
    await eventually(() => (openRequests() === 2 ? true : undefined));
    // Both have asked for a place; there is one.
    await new Promise((resolve) => setTimeout(resolve, 300));
    abort.abort();
    await expect(asked).rejects.toThrow();
    expect(openRequests()).toBe(2);
    await answer(await lease());
    await before.final();
    const work = await lease();
    expect(work.item.id).toBe(id);
    await eventually(() => (openRequests() === 0 ? true : undefined));
    await answer(work);
    const again = await post('/v1/completions', { prompt: 'Hi' }, { headers: { 'Idempotency-Key': id } });
    expect(await again.json()).toMatchObject({ choices: [{ text: 't0t1t2' }] });
  },
);

test('a reply brings its client nothing but the token and where the gateway hears of it', async () => {
  const connection = await connectToNats({ servers: nats.url });
  const inbox = createInbox();
  const received: { subject: string; reply: string; status: number | undefined }[] = [];
  connection.subscribe('>', {
    callback: (_, { subject, reply, headers }) => {
      if (/^_INBOX/.test(subject)) received.push({ subject, reply: reply ?? '', status: headers?.code });
    },
  });
  connection.publish(SUBJECTS.generate, 'Hi', { reply: inbox });
  const work = await lease();
  const { id } = work.item;
  const answered = (): typeof received => received.filter(({ subject }) => subject === inbox);
  for (const [index, end] of ([null, null, 'stop'] as const).entries()) {
    await store(tokens, [token(id, index, end)]);
    await eventually(() => (answered().length > index ? true : undefined));
  }
  work.complete();
  // Whatever the server might still say of the last.
  await gateway.context.bus.flush();
  await connection.flush();
  const own = answered();
  expect(own.map(({ reply }) => reply.split('.').length > 1)).toEqual([true, true, false]);
  expect(own.every(({ status }) => !status)).toBe(true);
  const watched = own[0]!.reply.split('.').slice(0, 2).join('.');
  expect(received.filter(({ subject }) => subject.startsWith(watched))).toEqual([]);
  await connection.close();
});

test('what is unheard is told to who published it, by the name that it gave it', async () => {
  const service = await Bus.connect({ url: nats.url, name: 'test', connectTimeoutMs: 5_000 }, { onError: () => {} });
  const names: string[] = [];
  const subjectOf = service.watchUnheard((name) => names.push(name));
  bus.subscribe('heard', () => undefined);
  await bus.flush();
  service.publishWithHeaders('heard', new Uint8Array(0), {}, subjectOf('a.0'));
  service.publishWithHeaders('unheard', new Uint8Array(0), {}, subjectOf('a.1'));
  service.publishWithHeaders('unheard', new Uint8Array(0), {});
  // No status of the server.
  bus.publish(subjectOf('forged'), new Uint8Array(0));
  await bus.flush();
  await service.flush();
  expect(names).toEqual(['a.1']);
  await service.close();
});
