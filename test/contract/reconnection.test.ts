/** A gateway whose connection to nats-server breaks and comes back while many answers are under way. */
import { once } from 'node:events';
import { type AddressInfo, connect as connectSocket, createServer, type Socket } from 'node:net';
import { type Bus, ensureStreams, TokenStream, type WorkLease, WorkQueue } from '@lamina/bus';
import { decodeTokens, STREAMS, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { startGateway } from '../../services/gateway/src/service.ts';
import { GATEWAY_FLAGS, playKvManager, READY, token } from './gateway-bench.ts';
import { connect, eventually, type InProcessService, startInProcess } from './in-process.ts';
import { store } from './store-answer.ts';

const NUM_REQUESTS = 150;

/** The gateway's way to nats-server. */
interface Wire {
  readonly url: string;
  cut(): void;
  mend(): void;
  stop(): Promise<void>;
}

async function wireTo(natsUrl: string): Promise<Wire> {
  const port = Number(new URL(natsUrl).port);
  const sockets = new Set<Socket>();
  let isCut = false;
  const server = createServer((client) => {
    if (isCut) return client.destroy();
    const upstream = connectSocket(port, '127.0.0.1');
    for (const [from, to] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      sockets.add(from);
      from.pipe(to);
      from.on('error', () => undefined);
      from.on('close', () => {
        sockets.delete(from);
        to.destroy();
      });
    }
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const drop = (): void => {
    for (const socket of sockets) socket.destroy();
  };
  return {
    url: `nats://127.0.0.1:${(server.address() as AddressInfo).port}`,
    cut: () => {
      isCut = true;
      drop();
    },
    mend: () => {
      isCut = false;
    },
    stop: async () => {
      drop();
      server.close();
      await once(server, 'close');
    },
  };
}

let nats: NatsServer;
let bus: Bus;
let wire: Wire;
let gateway: InProcessService;

beforeEach(async () => {
  nats = await startNatsServer();
  bus = await connect(nats.url);
  await ensureStreams(bus);
  await playKvManager(bus, () => READY);
  wire = await wireTo(nats.url);
  gateway = await startInProcess('gateway', startGateway, wire.url, [...GATEWAY_FLAGS, '--max-waiting-work', '1000']);
});
afterEach(async () => {
  await gateway.stop();
  await wire.stop();
  await bus.close();
  await nats.stop();
});

test('each token reaches its client once and in order, however often the gateway is cut off and joins again', async () => {
  const NUM_TOKENS = 60;
  const NUM_CUTS = 5;
  const queue = new WorkQueue(bus);
  const tokens = new TokenStream(bus, () => undefined);
  const { httpPort } = Object(gateway.running.stats?.());
  const ids = Array.from({ length: 12 }, (_, index) => `cut-${index}`);
  const texts = ids.map(async (id) => {
    const headers = { 'content-type': 'application/json', 'Idempotency-Key': id };
    const body = JSON.stringify({ prompt: 'Hi', stream: true });
    const response = await fetch(`http://127.0.0.1:${httpPort}/v1/completions`, { method: 'POST', headers, body });
    return response.text();
  });
  const works: WorkLease[] = [];
  while (works.length < ids.length) works.push(await eventually(() => queue.lease(1_000, () => undefined), 20_000));
  let isDone = false;
  let numCuts = 0;
  const cutting = (async () => {
    for (; !isDone; numCuts++) {
      wire.cut();
      await new Promise((resolve) => setTimeout(resolve, 50 * (numCuts % 4)));
      wire.mend();
      await new Promise((resolve) => setTimeout(resolve, 700));
    }
  })();
  for (let index = 0; index < NUM_TOKENS; index++) {
    // However fast tokens are stored, they come before, between and after the cuts.
    await eventually(() => (numCuts >= Math.floor((index * NUM_CUTS) / NUM_TOKENS) ? true : undefined), 20_000);
    for (const id of ids) await store(tokens, [token(id, index, index === NUM_TOKENS - 1 ? 'stop' : null)]);
    await new Promise((resolve) => setTimeout(resolve, index % 3 === 0 ? 60 : 0));
  }
  const all = await Promise.all(texts);
  isDone = true;
  await cutting;
  for (const text of all) {
    const indices = [...text.matchAll(/^id: (\d+)$/gm)].map(([, index]) => Number(index));
    expect(indices).toEqual(Array.from({ length: NUM_TOKENS }, (_, index) => index));
    expect(text).toMatch(/data: \[DONE\]\n\n$/);
  }
  for (const work of works) work.complete();
}, 120_000);

test('answers that missed tokens are read once, the others not at all, and all are followed again', async () => {
  const received = new Map<string, TokenMessage[]>();
  for (let index = 0; index < NUM_REQUESTS; index++) {
    const messages: TokenMessage[] = [];
    const id = `r${index}`;
    received.set(id, messages);
    bus.requestStream(SUBJECTS.generate, Buffer.from(JSON.stringify({ id, prompt: 'Hi' })), (reply) =>
      messages.push(...decodeTokens(reply!.data)),
    );
  }
  const have = (count: number, ids: readonly string[]): Promise<true> =>
    eventually(() => (ids.every((id) => received.get(id)!.length === count) ? true : undefined), 20_000);
  const queue = new WorkQueue(bus);
  const tokens = new TokenStream(bus, () => undefined);
  const works: WorkLease[] = [];
  while (works.length < NUM_REQUESTS) works.push(await eventually(() => queue.lease(1_000, () => undefined), 20_000));
  const all = [...received.keys()];
  for (const id of all) await store(tokens, [token(id, 0)]);
  await have(1, all);

  const calls: string[] = [];
  bus.connection.subscribe('$JS.API.>', { callback: (_, { subject }) => calls.push(subject) });
  const numCalls = (pattern: RegExp): number => calls.filter((subject) => pattern.test(subject)).length;
  const missing = all.slice(0, NUM_REQUESTS / 3);
  wire.cut();
  for (const id of missing) await store(tokens, [token(id, 1)]);
  wire.mend();
  await have(2, missing);
  // The last ones are looked at once more.
  await new Promise((resolve) => setTimeout(resolve, 2_000));
  expect(numCalls(/STREAM\.NAMES/)).toBe(0);
  expect(numCalls(/CONSUMER\.CREATE\.LAMINA_TOKENS/)).toBe(missing.length);

  const manager = await bus.connection.jetstreamManager();
  const numConsumers = async (): Promise<number> =>
    (await manager.streams.info(STREAMS.tokens.name)).state.consumer_count;
  await eventually(async () => ((await numConsumers()) === 0 ? true : undefined), 10_000);
  for (const id of all) await store(tokens, [token(id, received.get(id)!.length, 'stop')]);
  await have(3, missing);
  await have(
    2,
    all.filter((id) => !missing.includes(id)),
  );
  for (const id of all) {
    const end = missing.includes(id) ? 2 : 1;
    expect(received.get(id)).toEqual(
      Array.from({ length: end + 1 }, (_, index) => token(id, index, index === end ? 'stop' : null)),
    );
  }
  expect(numCalls(/CONSUMER\.CREATE\.LAMINA_TOKENS/)).toBe(missing.length);
  expect(Object(gateway.running.stats?.()).openRequests).toBe(0);
  for (const work of works) work.complete();
}, 120_000);
