/** A cluster that is full, over a real nats-server: who waits, who is next, who is refused. */
import { type Bus, ensureStreams, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { decodeTokens, STREAMS, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { createInbox, headers } from 'nats';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { answerWith, GATEWAY_FLAGS, messagesIn, playKvManager, READY } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

let nats: NatsServer;
let bus: Bus;
let gateway: InProcessService;
let queue: WorkQueue;
let tokens: TokenStream;

beforeEach(async () => {
  nats = await startNatsServer();
  bus = await connect(nats.url);
  await playKvManager(bus, () => READY);
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
});
afterEach(async () => {
  await gateway.stop();
  await bus.close();
  await nats.stop();
});

async function start(...flags: string[]): Promise<void> {
  gateway = await startInProcess('gateway', startGateway, nats.url, [
    ...GATEWAY_FLAGS,
    '--max-waiting-work',
    '1',
    ...flags,
  ]);
}

const openRequests = (): number => Object(gateway.running.stats?.()).openRequests;
const opened = (count: number): Promise<true> => eventually(() => (openRequests() === count ? true : undefined));
const lease = (): Promise<WorkLease> => eventually(() => queue.lease(1_000, () => undefined));

/** Resolves with the last message of the answer. */
function ask(body: object, client?: string): Promise<TokenMessage> {
  const set = headers();
  if (client !== undefined) set.set('Lamina-Client', client);
  const inbox = createInbox();
  return new Promise((resolve) => {
    bus.subscribe(inbox, (reply) => {
      if (reply.header('Lamina-Final') === 'true') resolve(decodeTokens(reply.data).at(-1)!);
    });
    const data = Buffer.from(JSON.stringify({ max_tokens: 8, ...body }));
    bus.connection.publish(SUBJECTS.generate, data, { headers: set, reply: inbox });
  });
}

/** Ids in the order in which an executor gets them. */
async function served(count: number): Promise<string[]> {
  const ids: string[] = [];
  for (let taken = 0; taken < count; taken++) {
    const work = await lease();
    ids.push(work.item.id);
    await answerWith(tokens, work, 1);
  }
  return ids;
}

test('a client with one request is not kept waiting by one with many', async () => {
  await start();
  const answers = Array.from({ length: 30 }, (_, index) => ask({ id: `busy-${index}`, prompt: 'Hi' }, 'busy'));
  await opened(30);
  answers.push(ask({ id: 'modest', prompt: 'Hi' }, 'modest'));
  await opened(31);
  const ids = await served(31);
  // One is in the work queue already, and one may be on its way.
  expect(ids.indexOf('modest')).toBeLessThanOrEqual(3);
  for (const answer of await Promise.all(answers)) expect(answer.finish_reason).toBe('length');
}, 60_000);

test('priorities hold among the requests of one client', async () => {
  await start();
  const answers = [0, 0, 0, 0, 5, 9].map((priority, index) => ask({ id: `r${index}`, prompt: 'Hi', priority }));
  await opened(6);
  const ids = await served(6);
  expect(ids.indexOf('r5')).toBeLessThan(ids.indexOf('r4'));
  expect(ids.indexOf('r4')).toBeLessThanOrEqual(3);
  await Promise.all(answers);
});

test('who waits can be cancelled, and deadlines hold', async () => {
  await start();
  const first = ask({ id: 'first', prompt: 'Hi' });
  await eventually(async () => ((await messagesIn(bus, 'work')) === 1 ? true : undefined));
  const cancelled = ask({ id: 'cancelled', prompt: 'Hi' });
  const late = ask({ id: 'late', prompt: 'Hi', deadline_ms: 200 });
  await opened(3);
  bus.publish(SUBJECTS.cancel('cancelled'), new Uint8Array(0));
  expect((await cancelled).finish_reason).toBe('cancelled');
  expect((await late).error?.code).toBe('deadline_exceeded');
  expect(await served(1)).toEqual(['first']);
  await first;
  expect(await messagesIn(bus, 'work')).toBe(0);
});

test('beyond its share a client is refused at once, with a time; another is not, nor is a durable prompt', async () => {
  await start('--max-open-per-client', '2', '--max-open-requests', '4');
  const answers = ['a', 'a'].map((client, index) => ask({ id: `a${index}`, prompt: 'Hi' }, client));
  await opened(2);
  const refusal = { code: 'overloaded', message: expect.stringContaining('"a"'), retryAfterMs: expect.any(Number) };
  expect((await ask({ prompt: 'Hi' }, 'a')).error).toEqual(refusal);
  answers.push(ask({ id: 'b0', prompt: 'Hi' }, 'b'), ask({ id: 'c0', prompt: 'Hi' }, 'c'));
  await opened(4);
  expect((await ask({ prompt: 'Hi' }, 'd')).error).toMatchObject({ code: 'overloaded', retryAfterMs: 1_000 });
  await bus.connection.jetstream().publish(SUBJECTS.prompts, Buffer.from('{"id":"durable","prompt":"Hi"}'));
  expect((await served(5)).sort()).toEqual(['a0', 'a1', 'b0', 'c0', 'durable']);
  await Promise.all(answers);
  expect((await ask({ prompt: 'Hi' }, 'not an id')).error?.code).toBe('invalid_request');
});

test("one durable prompt is not kept waiting by another client's 500, each is answered once, each client's in order", async () => {
  await ensureStreams(bus);
  const publish = (id: string, client: string) => {
    const set = headers();
    set.set('Lamina-Client', client);
    return bus.connection.jetstream().publish(SUBJECTS.prompts, JSON.stringify({ id, prompt: 'Hi' }), { headers: set });
  };
  const busy = Array.from({ length: 500 }, (_, index) => `busy-${index}`);
  for (const id of busy) await publish(id, 'busy');
  await publish('modest', 'modest');
  await start();
  const manager = await bus.connection.jetstreamManager();
  const { name, durableConsumer } = STREAMS.prompts;
  // One goes into the work queue, and one may be on its way.
  await eventually(async () => {
    const { num_pending } = await manager.consumers.info(name, durableConsumer);
    return num_pending === 0 ? true : undefined;
  });
  const ids = await served(501);
  // 32 prompts of the busy client were in hand when the modest one's was seen.
  expect(ids.indexOf('modest')).toBeLessThanOrEqual(35);
  expect([...ids].sort()).toEqual([...busy, 'modest'].sort());
  const places = busy.map((id) => ids.indexOf(id));
  for (const [index, place] of places.entries()) expect(Math.abs(place - index)).toBeLessThanOrEqual(35);
  await eventually(async () => ((await messagesIn(bus, 'prompts')) === 0 ? true : undefined));
}, 120_000);
