/** Many durable prompts that wait at a gateway, over a real nats-server: what that costs, and that a dead gateway frees them. */
import { type Bus, ensureStreams, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { STREAMS, SUBJECTS } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import type { ConsumerInfo } from 'nats';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { answerWith, GATEWAY_FLAGS, messagesIn, playKvManager, READY } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';

const FLAGS = [...GATEWAY_FLAGS, '--max-waiting-work', '1'];
/** As many as a gateway has in hand: they come back by themselves. */
const IN_HAND = 32;
const NUM_WAITING = 2_000;
let nats: NatsServer;
let bus: Bus;
let gateway: InProcessService;

beforeEach(async () => {
  nats = await startNatsServer();
  bus = await connect(nats.url);
  await ensureStreams(bus);
  await playKvManager(bus, () => READY);
});
afterEach(async () => {
  await gateway.stop();
  await bus.close();
  await nats.stop();
});

async function publish(count: number): Promise<string[]> {
  const ids = Array.from({ length: count }, (_, index) => `r${index}`);
  for (const id of ids)
    await bus.connection.jetstream().publish(SUBJECTS.prompts, JSON.stringify({ id, prompt: 'Hi' }));
  return ids;
}

async function consumer(): Promise<ConsumerInfo> {
  const manager = await bus.connection.jetstreamManager();
  return manager.consumers.info(STREAMS.prompts.name, STREAMS.prompts.durableConsumer);
}

const allTaken = () => eventually(async () => ((await consumer()).num_pending === 0 ? true : undefined), 30_000);

test('2,000 that wait are sent once, and kept with few messages a second', async () => {
  await publish(NUM_WAITING);
  gateway = await startInProcess('gateway', startGateway, nats.url, FLAGS);
  await allTaken();
  const before = { ...gateway.context.bus.connection.stats(), ...(await consumer()) };
  const startedMs = performance.now();
  // Longer than the server waits for a sign of life, and than each is kept at first.
  await new Promise((resolve) => setTimeout(resolve, 15_000));
  const seconds = (performance.now() - startedMs) / 1_000;
  const after = { ...gateway.context.bus.connection.stats(), ...(await consumer()) };
  // 200 that keep them, and what 32 in hand and the question for room in the work queue take.
  expect((after.outMsgs - before.outMsgs) / seconds).toBeLessThan(400);
  expect(after.num_redelivered).toBe(0);
  expect(after.delivered.consumer_seq).toBe(before.delivered.consumer_seq);
  expect(after.num_ack_pending).toBeGreaterThan(1_990);
}, 90_000);

test('of a gateway that dies another is offered the first at once, whatever else had waited there', async () => {
  await publish(NUM_WAITING);
  const former = await startInProcess('gateway', startGateway, nats.url, FLAGS);
  await allTaken();
  gateway = await startInProcess('gateway', startGateway, nats.url, FLAGS);
  // Those that were looked at when fewer waited have been kept anew by now.
  await new Promise((resolve) => setTimeout(resolve, 12_000));
  const { consumer_seq: before } = (await consumer()).delivered;
  await former.crash();
  const startMs = performance.now();
  const isOffered = async () => ((await consumer()).delivered.consumer_seq - before >= IN_HAND + 10 ? true : undefined);
  await eventually(isOffered, 30_000);
  expect(performance.now() - startMs).toBeLessThan(9_000);
}, 120_000);

test('a gateway that stops or dies leaves them to another, which hands each over once', async () => {
  const ids = await publish(120);
  for (const end of ['stop', 'crash'] as const) {
    const former = await startInProcess('gateway', startGateway, nats.url, FLAGS);
    await allTaken();
    await former[end]();
  }
  gateway = await startInProcess('gateway', startGateway, nats.url, FLAGS);
  const queue = new WorkQueue(bus);
  const tokens = new TokenStream(bus, () => undefined);
  const served: string[] = [];
  while (served.length < ids.length) {
    const work: WorkLease = await eventually(() => queue.lease(1_000, () => undefined), 15_000);
    served.push(work.item.id);
    await answerWith(tokens, work, 1);
  }
  expect(served.sort()).toEqual(ids.sort());
  await eventually(async () => ((await messagesIn(bus, 'prompts')) === 0 ? true : undefined), 10_000);
  expect(await messagesIn(bus, 'work')).toBe(0);
}, 90_000);
