/** Durable prompts over a real nats-server: accepted means answered, and the same id twice is one request. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Bus, ensureStreams, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { CLOCK_TOLERANCE_MS, type KvStatus, packMessage, STREAMS, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { MAX_PER_WINDOW } from '@lamina/runtime';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { headers, type PubAck } from 'nats';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { answerWith, GATEWAY_FLAGS, messagesIn, playKvManager, READY, token } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';
import { store } from './store-answer.ts';

const LEASE_MS = 1_000;
const DOWN: KvStatus = { ...READY, executors: [] };

let storeDir: string;
let nats: NatsServer;
let bus: Bus;
let queue: WorkQueue;
let tokens: TokenStream;
let kvStatus: KvStatus;
let gateways: InProcessService[];

beforeEach(async () => {
  storeDir = mkdtempSync(join(tmpdir(), 'lamina-store-'));
  nats = await startNatsServer({ storeDir });
  bus = await connect(nats.url);
  await ensureStreams(bus);
  kvStatus = READY;
  await playKvManager(bus, () => kvStatus);
  queue = new WorkQueue(bus);
  tokens = new TokenStream(bus, () => undefined);
  gateways = [];
});
afterEach(async () => {
  for (const gateway of gateways) await gateway.stop();
  await bus.close();
  await nats.stop();
  rmSync(storeDir, { recursive: true, force: true });
});

async function start(): Promise<InProcessService> {
  const gateway = await startInProcess('gateway', startGateway, nats.url, GATEWAY_FLAGS);
  gateways.push(gateway);
  return gateway;
}

/** An ordinary JetStream client. */
function publish(body: object | string | Uint8Array, messageId?: string): Promise<PubAck> {
  const data = body instanceof Uint8Array ? body : Buffer.from(typeof body === 'string' ? body : JSON.stringify(body));
  const set = headers();
  if (messageId !== undefined) set.set('Nats-Msg-Id', messageId);
  return bus.connection.jetstream().publish(SUBJECTS.prompts, data, { headers: set });
}

const lease = (): Promise<WorkLease> => eventually(() => queue.lease(LEASE_MS, () => undefined));
const nothingQueued = async (): Promise<void> => expect(await queue.lease(LEASE_MS, () => undefined)).toBeUndefined();
const promptsDone = (): Promise<true> =>
  eventually(async () => ((await messagesIn(bus, 'prompts')) === 0 ? true : undefined), 15_000);

/** The stored answer, once it is complete. */
async function stored(id: string): Promise<TokenMessage[]> {
  await eventually(async () => ((await tokens.endOf(id))?.isComplete ? true : undefined));
  return [...(await tokens.stored(id)).tokens];
}

describe('the id of a durable prompt', () => {
  test('is that of the body, else the message id, else p and the sequence of the PubAck', async () => {
    await start();
    const { seq } = await publish('Once upon a time');
    expect((await lease()).item).toMatchObject({ id: `p${seq}`, encoding: 'json', model: 'lamina-tiny' });
    await publish(packMessage({ prompt: 'Hi', max_tokens: 3 }), 'by-header');
    expect((await lease()).item).toMatchObject({ id: 'by-header', encoding: 'msgpack', maxTokens: 3 });
    await publish({ id: 'by-body', messages: [{ role: 'user', content: 'Hi' }] }, 'another');
    expect((await lease()).item.id).toBe('by-body');
    await promptsDone();
  });

  test('twice is one request: while it waits, while it runs, when it has ended and after a restart of the server', async () => {
    await publish({ id: 'twice', prompt: 'Hi' });
    await publish({ id: 'twice', prompt: 'Hi' });
    const gateway = await start();
    const work = await lease();
    await promptsDone();
    await publish({ id: 'twice', prompt: 'Hi' });
    await promptsDone();
    await answerWith(tokens, work);
    await publish('Hi', 'twice');
    await promptsDone();
    await gateway.stop();
    gateways.pop();
    await bus.close();
    await nats.kill();
    nats = await startNatsServer({ storeDir, port: nats.port });
    bus = await connect(nats.url);
    await playKvManager(bus, () => kvStatus);
    queue = new WorkQueue(bus);
    tokens = new TokenStream(bus, () => undefined);
    // The server has forgotten the message id, as it does after its window.
    expect((await publish('Hi', 'twice')).duplicate).toBe(false);
    await start();
    await promptsDone();
    await nothingQueued();
    expect((await stored('twice')).map(({ index }) => index)).toEqual([0, 1, 2]);
  });

  test('is shared with lamina.v1.generate', async () => {
    await start();
    await publish({ id: 'both', prompt: 'Hi' });
    const work = await lease();
    const seen: number[] = [];
    const asked = bus.requestStream(SUBJECTS.generate, Buffer.from('{"id":"both","prompt":"Hi"}'), (reply) =>
      seen.push(JSON.parse(Buffer.from(reply!.data).toString()).index),
    );
    await answerWith(tokens, work);
    await eventually(() => (seen.length === 3 ? true : undefined));
    expect(seen).toEqual([0, 1, 2]);
    asked.unsubscribe();
    await nothingQueued();
  });

  test('that was generated is not answered with the answer to a prompt of a former stream', async () => {
    const former = Array.from({ length: 3 * MAX_PER_WINDOW }, (_, index) => `p${index + 1}`);
    for (const id of former) await store(tokens, [token(id, 0, 'stop')]);
    const { context } = await start();
    for (const _ of former) await publish('Hi');
    await nothingQueued();
    expect(await messagesIn(bus, 'prompts')).toBe(former.length);
    // Told of all, by complaints, which keep the log short.
    const told = /lamina_bus_errors_total\{code="unavailable"\} (\d+)/.exec(await context.registry.metrics());
    expect(Number(told?.[1])).toBeGreaterThanOrEqual(former.length);
    // An hour is too long for a test.
    const manager = await bus.connection.jetstreamManager();
    await manager.streams.update(STREAMS.tokens.name, { duplicate_window: 1e8, max_age: 1e8 });
    await eventually(async () => ((await messagesIn(bus, 'tokens')) === 0 ? true : undefined));
    await manager.streams.update(STREAMS.tokens.name, { max_age: 3600e9 });
    const work = await eventually(() => queue.lease(LEASE_MS, () => undefined), 15_000);
    const { id } = work.item;
    expect(former).toContain(id);
    await answerWith(tokens, work, 2);
    expect((await stored(id)).map(({ index, finish_reason }) => [index, finish_reason])).toEqual([
      [0, null],
      [1, 'length'],
    ]);
  });
});

describe('a durable prompt that cannot be run', () => {
  const long = Array.from({ length: 1_100 }, () => 1);
  test.for([
    ['an empty body', '', 'invalid_request'],
    ['neither text nor msgpack', Uint8Array.of(0xff, 0xfe, 0x80), 'invalid_request'],
    ['broken JSON', '{"prompt": ', 'invalid_request'],
    ['an unknown field', { prompt: 'a', max_token: 3 }, 'invalid_request'],
    ['an unknown model', { prompt: 'a', model: 'gpt' }, 'unknown_model'],
    ['too long a prompt', { token_ids: long }, 'context_length_exceeded'],
    ['a deadline that has passed', { prompt: 'a', deadline_ms: 1 }, 'deadline_exceeded'],
  ] as const)('because of %s is answered with the error, once', async ([, body, code]) => {
    const { seq } = await publish(body);
    await new Promise((resolve) => setTimeout(resolve, 5));
    await start();
    expect(await stored(`p${seq}`)).toMatchObject([
      { id: `p${seq}`, index: 0, token: null, finish_reason: 'error', error: { code } },
    ]);
    await promptsDone();
    await nothingQueued();
  });

  test('has its error under its id where that is readable, in its encoding', async () => {
    await start();
    await publish({ id: 'bad-json', prompt: 'a', max_tokens: 0 });
    await publish(packMessage({ id: 'bad-msgpack', prompt: 'a', max_tokens: 0 }));
    await publish('{', 'bad-header');
    const { seq } = await publish({ prompt: 'a' }, 'no.subject');
    for (const id of ['bad-json', 'bad-msgpack', 'bad-header', `p${seq}`])
      expect(await stored(id)).toMatchObject([{ id, error: { code: 'invalid_request' } }]);
    expect((await stored(`p${seq}`))[0]?.error?.message).toContain('Nats-Msg-Id');
    await promptsDone();
  });

  test('leaves a request alone that has its id', async () => {
    await start();
    await publish({ id: 'victim', prompt: 'Hi' });
    const work = await lease();
    await publish({ id: 'victim', prompt: 'a', max_tokens: 0 });
    await promptsDone();
    await answerWith(tokens, work);
    expect((await stored('victim')).map(({ index }) => index)).toEqual([0, 1, 2]);
    await publish({ id: 'victim', prompt: 'a', max_tokens: 0 });
    await promptsDone();
    expect((await stored('victim')).at(-1)).toMatchObject({ index: 2, finish_reason: 'length' });
  });
});

describe('a durable prompt waits', () => {
  test('for a gateway', async () => {
    const acks = await Promise.all(Array.from({ length: 50 }, () => publish('Hi')));
    await start();
    const ids = new Set<string>();
    for (const _ of acks) {
      const work = await lease();
      ids.add(work.item.id);
      await answerWith(tokens, work, 1);
    }
    expect(ids).toEqual(new Set(acks.map(({ seq }) => `p${seq}`)));
    await promptsDone();
  });

  test('for an executor', async () => {
    kvStatus = DOWN;
    await start();
    const { seq } = await publish('Hi');
    await nothingQueued();
    expect(await messagesIn(bus, 'prompts')).toBe(1);
    kvStatus = READY;
    expect((await lease()).item.id).toBe(`p${seq}`);
    await promptsDone();
  });

  test('for more KV than there is, and does not hold the next one up', async () => {
    await start();
    await publish({ id: 'large', token_ids: [1], max_tokens: 600 });
    await publish({ id: 'small', token_ids: [1], max_tokens: 6 });
    const small = await lease();
    expect(small.item.id).toBe('small');
    small.complete();
    kvStatus = { ...READY, shards: [{ ...READY.shards[0]!, numBlocks: 64 }] };
    expect((await eventually(() => queue.lease(LEASE_MS, () => undefined), 10_000)).item.id).toBe('large');
    await promptsDone();
  });

  test('for room in the work queue', async () => {
    const manager = await bus.connection.jetstreamManager();
    await start();
    await manager.streams.update(STREAMS.work.name, { max_msgs: 1 });
    await publish({ id: 'first', prompt: 'Hi' });
    await eventually(async () => ((await messagesIn(bus, 'work')) === 1 ? true : undefined));
    await publish({ id: 'second', prompt: 'Hi' });
    const first = await lease();
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    expect([await messagesIn(bus, 'prompts'), await tokens.endOf('second')]).toEqual([1, undefined]);
    await answerWith(tokens, first);
    expect((await lease()).item.id).toBe('second');
    await promptsDone();
  });

  test('and is cancelled while it does', async () => {
    kvStatus = DOWN;
    await start();
    const { seq } = await publish('Hi');
    await eventually(async () => ((await messagesIn(bus, 'prompts')) === 1 ? true : undefined));
    bus.publish(SUBJECTS.cancel(`p${seq}`), new Uint8Array(0));
    expect(await stored(`p${seq}`)).toMatchObject([{ index: 0, token: null, finish_reason: 'cancelled' }]);
    await promptsDone();
    await nothingQueued();
  });

  test('and is ended by the cancel that overtook it, but by none that was sent in advance', async () => {
    kvStatus = DOWN;
    await start();
    bus.publish(SUBJECTS.cancel('in-advance'), new Uint8Array(0));
    await new Promise((resolve) => setTimeout(resolve, CLOCK_TOLERANCE_MS + 200));
    bus.publish(SUBJECTS.cancel('overtaken'), new Uint8Array(0));
    await publish({ id: 'in-advance', prompt: 'Hi' });
    await publish({ id: 'overtaken', prompt: 'Hi' });
    expect(await stored('overtaken')).toMatchObject([{ index: 0, token: null, finish_reason: 'cancelled' }]);
    kvStatus = READY;
    const work = await lease();
    expect(work.item.id).toBe('in-advance');
    await answerWith(tokens, work);
    expect((await stored('in-advance')).map(({ index }) => index)).toEqual([0, 1, 2]);
    await promptsDone();
    await nothingQueued();
  });
});

describe('a gateway that dies', () => {
  test('with a prompt in hand leaves it to another', async () => {
    kvStatus = DOWN;
    const first = await start();
    const { seq } = await publish('Hi');
    await nothingQueued();
    await first.crash();
    gateways.pop();
    kvStatus = READY;
    await start();
    expect((await eventually(() => queue.lease(LEASE_MS, () => undefined), 12_000)).item.id).toBe(`p${seq}`);
    await promptsDone();
  });

  test('between the work queue and its acknowledgement has submitted the prompt once', async () => {
    const { seq } = await publish('Hi');
    const first = await start();
    const work = await lease();
    await promptsDone();
    await first.crash();
    gateways.pop();
    // The acknowledgement was lost: the stream still has the prompt.
    await publish({ id: `p${seq}`, prompt: 'Hi' });
    await answerWith(tokens, work);
    await start();
    await promptsDone();
    await nothingQueued();
    expect((await stored(`p${seq}`)).map(({ index }) => index)).toEqual([0, 1, 2]);
  });
});

test('a full stream refuses what comes and keeps what it has', async () => {
  const manager = await bus.connection.jetstreamManager();
  await manager.streams.update(STREAMS.prompts.name, { max_msgs: 2 });
  const acks = [await publish('one'), await publish('two')];
  await expect(publish('three')).rejects.toMatchObject({ api_error: { description: 'maximum messages exceeded' } });
  await start();
  // Prompts that are in hand at the same time are looked up beside each other, in no order.
  const leased = [(await lease()).item.id, (await lease()).item.id];
  expect(leased.sort()).toEqual(acks.map(({ seq }) => `p${seq}`).sort());
  await promptsDone();
});
