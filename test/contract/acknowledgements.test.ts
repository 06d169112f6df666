/**
 * That a queue is empty once all in it is done, on a real nats-server that comes back with the store of a moment ago, as one
 * that was killed may: nobody takes from the queue meanwhile, so nothing but the new connection can be the cause.
 */
import { cpSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Bus, ensureStreams, PromptQueue, WorkQueue } from '@lamina/bus';
import { STREAMS, SUBJECTS } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import type { JetStreamManager } from 'nats';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { LEASE_MS, workItem } from './bus-bench.ts';
import { connect, eventually } from './in-process.ts';

const NUM_MESSAGES = 4;

const QUEUES = [
  {
    ...STREAMS.work,
    put: (bus: Bus, id: string): Promise<unknown> => new WorkQueue(bus).submit(workItem(id)),
    /** Takes from the queue; what is returned says that the message is done. */
    taker: (bus: Bus) => {
      const queue = new WorkQueue(bus);
      return async () => {
        const lease = await queue.lease(LEASE_MS, () => undefined);
        return lease && (() => lease.complete());
      };
    },
  },
  {
    ...STREAMS.prompts,
    put: (bus: Bus, id: string): Promise<unknown> => bus.connection.jetstream().publish(SUBJECTS.prompts, id),
    taker: (bus: Bus) => {
      const queue = new PromptQueue(bus, () => undefined);
      return async () => {
        const prompt = await queue.take(LEASE_MS);
        return prompt && (() => prompt.done());
      };
    },
  },
];

let storeDir: string;
let nats: NatsServer;
let bus: Bus;
let manager: JetStreamManager;

beforeEach(async () => {
  storeDir = mkdtempSync(join(tmpdir(), 'lamina-acknowledgements-'));
  nats = await startNatsServer({ storeDir });
  bus = await connect(nats.url);
  await ensureStreams(bus);
  manager = await bus.connection.jetstreamManager();
});

afterEach(async () => {
  await bus.close();
  await nats.stop();
  rmSync(storeDir, { recursive: true, force: true });
});

/** Ends the server, does `between`, and starts it where it was; the connection stays the same one. */
async function restart(between: () => void): Promise<void> {
  const { port } = nats;
  await nats.stop();
  between();
  const isBack = new Promise<void>((resolve) => {
    bus.onStatus((type) => {
      if (type === 'reconnect') resolve();
    });
  });
  nats = await startNatsServer({ storeDir, port });
  await isBack;
}

describe.for(QUEUES)('$name', ({ name, durableConsumer, put, taker }) => {
  const directory = (part: 'msgs' | 'obs'): string => join(storeDir, 'jetstream', '$G', 'streams', name, part);
  const numStored = async (): Promise<number> => (await manager.streams.info(name)).state.messages;
  const numHeld = async (): Promise<number> => (await manager.consumers.info(name, durableConsumer)).num_ack_pending;

  /** Puts messages in and takes them. */
  async function takeAll(): Promise<(() => void)[]> {
    const take = taker(bus);
    const taken: (() => void)[] = [];
    for (let i = 0; i < NUM_MESSAGES; i++) {
      await put(bus, `message-${i}`);
      taken.push((await take())!);
    }
    return taken;
  }

  async function finish(taken: readonly (() => void)[]): Promise<void> {
    for (const done of taken) done();
    await untilThereAre(NUM_MESSAGES - taken.length);
  }

  const untilThereAre = (num: number): Promise<true> =>
    eventually(async () => ((await numStored()) === num && (await numHeld()) === num ? true : undefined));

  const copyTo = (part: 'msgs' | 'obs'): string => {
    const copy = join(storeDir, `${part}-before`);
    cpSync(directory(part), copy, { recursive: true });
    return copy;
  };

  /** Restarts the server with that part of the store as it was. */
  async function comeBackWith(part: 'msgs' | 'obs', copy: string): Promise<void> {
    await restart(() => {
      rmSync(directory(part), { recursive: true });
      cpSync(copy, directory(part), { recursive: true });
    });
  }

  test('messages that were done and are there again are removed', async () => {
    const taken = await takeAll();
    const copy = copyTo('msgs');
    await finish(taken);
    await comeBackWith('msgs', copy);
    await untilThereAre(0);
  });

  test('messages that were done and are gone are no longer counted as held', async () => {
    const taken = await takeAll();
    // The server writes a moment later what it delivered.
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    const copy = copyTo('obs');
    // The server corrects by itself what it counts before the first message that is there.
    await finish(taken.slice(1));
    await comeBackWith('obs', copy);
    await untilThereAre(1);
  });

  test('what is done while the connection is down is removed', async () => {
    const taken = await takeAll();
    await restart(() => {
      for (const done of taken) done();
    });
    await untilThereAre(0);
  });

  test('what has the place of a message that was done is kept', async () => {
    await finish(await takeAll());
    const otherDir = mkdtempSync(join(tmpdir(), 'lamina-acknowledgements-'));
    const other = await startNatsServer({ storeDir: otherDir });
    const client = await connect(other.url);
    await ensureStreams(client);
    for (let i = 0; i < NUM_MESSAGES; i++) await put(client, `another-${i}`);
    await client.close();
    await other.stop();
    await restart(() => {
      rmSync(join(storeDir, 'jetstream'), { recursive: true });
      cpSync(join(otherDir, 'jetstream'), join(storeDir, 'jetstream'), { recursive: true });
    });
    rmSync(otherDir, { recursive: true });
    // As long as what is acknowledged again takes, several times.
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    expect(await numStored()).toBe(NUM_MESSAGES);
  });
});
