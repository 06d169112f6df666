/**
 * That no message waits for ever behind a consumer that does not offer it, on a real nats-server: one whose store lost what
 * a kill can lose, and one whose consumer holds back.
 */
import { cpSync, existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Bus, ensureStreams, type WorkLease, WorkQueue } from '@lamina/bus';
import { STREAMS } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import type { JetStreamManager, Msg } from 'nats';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { LEASE_MS, workItem, workSubject } from './bus-bench.ts';
import { connect, eventually } from './in-process.ts';

const { name, durableConsumer } = STREAMS.work;

let storeDir: string;
let nats: NatsServer;
let bus: Bus;
let manager: JetStreamManager;
let queue: WorkQueue;
let repairs: LaminaError[];

async function open(): Promise<void> {
  nats = await startNatsServer({ storeDir });
  bus = await connect(nats.url);
  await ensureStreams(bus);
  manager = await bus.connection.jetstreamManager();
  queue = new WorkQueue(bus);
  repairs = [];
}

async function shut(): Promise<void> {
  await bus.close();
  await nats.stop();
}

beforeEach(async () => {
  storeDir = mkdtempSync(join(tmpdir(), 'lamina-pull-'));
  await open();
});

afterEach(async () => {
  await shut();
  rmSync(storeDir, { recursive: true, force: true });
});

const lease = (): Promise<WorkLease | undefined> => queue.lease(LEASE_MS, (error) => repairs.push(error));

const numQueued = async (): Promise<number> => (await manager.streams.info(name)).state.messages;

test('an item that the consumer counts as done and the stream still has is offered again', async () => {
  await queue.submit(workItem('kept'));
  await queue.submit(workItem('done'));
  const messages = join(storeDir, 'jetstream', '$G', 'streams', name, 'msgs');
  const [first, second] = [await lease(), await lease()];
  // What a killed server may have lost: that the messages are gone, though not that they were acknowledged.
  expect(existsSync(messages)).toBe(true);
  const copy = join(storeDir, 'msgs-before');
  cpSync(messages, copy, { recursive: true });
  first?.complete();
  second?.complete();
  await eventually(async () => ((await numQueued()) === 0 ? true : undefined));
  // The server writes a moment later what was acknowledged.
  await new Promise((resolve) => setTimeout(resolve, 1_000));
  await shut();
  rmSync(messages, { recursive: true });
  cpSync(copy, messages, { recursive: true });
  await open();
  expect(await numQueued()).toBeGreaterThan(0);
  const { ack_floor } = await manager.consumers.info(name, durableConsumer);
  // Where it had not written that, it offers the messages by itself.
  const isPassedOver = ack_floor.stream_seq > 0;

  const offered: string[] = [];
  for (let attempt = 0; attempt < 12 && (await numQueued()) > 0; attempt++) {
    const work = await lease();
    if (work === undefined) continue;
    offered.push(work.item.id);
    work.complete();
    await bus.flush();
  }
  expect(offered).toEqual(['kept', 'done']);
  expect(repairs.map(({ code }) => code)).toEqual(isPassedOver ? ['unavailable'] : []);
  for (const { message } of repairs) expect(message).toMatch(/LAMINA_WORK did not offer message 1, which it counts as/);
  expect(await lease()).toBeUndefined();
  expect(repairs.length).toBe(isPassedOver ? 1 : 0);
});

/** In place of the consumer, one that offers no item but that of this id. */
async function holdBackAllBut(id: string): Promise<void> {
  const { config } = await manager.consumers.info(name, durableConsumer);
  await manager.consumers.delete(name, durableConsumer);
  await manager.consumers.add(name, { ...config, filter_subject: await workSubject(bus, id) });
}

test('an item that nobody holds and that is not offered is offered by a new consumer', async () => {
  await holdBackAllBut('held');
  for (const id of ['held', 'stuck']) await queue.submit(workItem(id));
  const held = await lease();
  const renewal = setInterval(() => held?.renew(), 500);
  try {
    expect(await lease()).toBeUndefined();
    expect(repairs).toEqual([]);
    expect(await lease()).toBeUndefined();
    expect(repairs.map(({ message }) => message)).toEqual([
      'the consumer of LAMINA_WORK did not offer 1 messages; it was made anew',
    ]);
    // What was held is offered as well: whoever takes it finds out by its id.
    const again = [await lease(), await lease()];
    expect(again.map((work) => work?.item.id)).toEqual(['held', 'stuck']);
    for (const work of again) work?.complete();
    await eventually(async () => ((await numQueued()) === 0 ? true : undefined));
  } finally {
    clearInterval(renewal);
  }
});

test('nothing is repaired while items are held, handed back for later, or absent', async () => {
  expect(await lease()).toBeUndefined();
  for (const id of ['held', 'later']) await queue.submit(workItem(id));
  const held = await lease();
  const later = await lease();
  later?.release(60_000);
  for (let i = 0; i < 3; i++) {
    held?.renew();
    expect(await lease()).toBeUndefined();
  }
  held?.complete();
  expect(await lease()).toBeUndefined();
  expect(await lease()).toBeUndefined();
  expect(repairs).toEqual([]);
});

test('nothing is repaired while as many items are held as may be', async () => {
  await manager.consumers.update(name, durableConsumer, { max_ack_pending: 1 });
  for (const id of ['held', 'next']) await queue.submit(workItem(id));
  const held = await lease();
  for (let i = 0; i < 3; i++) {
    held?.renew();
    expect(await lease()).toBeUndefined();
  }
  expect(repairs).toEqual([]);
  held?.complete();
  expect((await lease())?.item.id).toBe('next');
});

test('a consumer that somebody deleted is made again', async () => {
  expect(await lease()).toBeUndefined();
  await manager.consumers.delete(name, durableConsumer);
  await queue.submit(workItem('orphan'));
  // The pull that finds no consumer may be told so, or wait in vain.
  const work = (await lease().catch(() => undefined)) ?? (await lease());
  expect(work?.item.id).toBe('orphan');
});

describe('two that pull from the same consumer', () => {
  /** A request to the server's API of consumers; `send` lets it go. */
  type Around = (api: string, send: () => Promise<Msg>) => Promise<Msg>;

  const ITEMS = ['a', 'b', 'c', 'd'];
  const WORK_MS = 1_200;
  let others: Bus[];

  beforeEach(() => {
    others = [];
  });
  afterEach(async () => {
    vi.restoreAllMocks();
    for (const other of others) await other.close();
  });

  /** A connection whose requests to look at, make or delete a consumer go when the test lets them. */
  async function connectAround(around: Around): Promise<Bus> {
    const other = await connect(nats.url);
    others.push(other);
    const { connection } = other;
    const request = connection.request.bind(connection);
    vi.spyOn(connection, 'request').mockImplementation((subject, ...rest) => {
      const api = /^\$JS\.API\.CONSUMER\.(?:DURABLE\.)?(INFO|CREATE|DELETE)\./.exec(subject)?.[1];
      const send = (): Promise<Msg> => request(subject, ...rest);
      return api === undefined ? send() : around(api, send);
    });
    return other;
  }

  /** Leases as an executor does, until it is told to stop; works on each item for a while, and completes it. */
  class Puller {
    readonly leased: string[] = [];
    readonly #queue: WorkQueue;
    #isStopped = false;
    readonly #working = new Set<Promise<void>>();

    constructor(ownBus: Bus) {
      this.#queue = new WorkQueue(ownBus);
    }

    async run(): Promise<void> {
      while (!this.#isStopped) {
        // A pull that waits at a consumer which is deleted is refused; executors try again after a pause.
        const work = await this.#queue.lease(LEASE_MS, (error) => repairs.push(error)).catch(() => undefined);
        if (work === undefined) continue;
        this.leased.push(work.item.id);
        const working = this.#work(work).finally(() => this.#working.delete(working));
        this.#working.add(working);
        await sleep(100);
      }
      await Promise.all(this.#working);
    }

    async #work(work: WorkLease): Promise<void> {
      const renewal = setInterval(() => work.renew(), WORK_MS / 3);
      await sleep(WORK_MS);
      clearInterval(renewal);
      work.complete();
    }

    stop(): void {
      this.#isStopped = true;
    }
  }

  /** Lets both pull until everything is done, and then each take one more. */
  async function pullAll(pullers: readonly Puller[]): Promise<void> {
    const running = pullers.map((puller) => puller.run());
    try {
      await eventually(async () => ((await numQueued()) === 0 ? true : undefined), 20_000);
      expect(new Set(pullers.flatMap(({ leased }) => leased))).toEqual(new Set(ITEMS));
      // Each is busy for 100 ms when it has taken one: the other takes what comes then.
      const numBefore = pullers.map(({ leased }) => leased.length);
      await eventually(async () => {
        await queue.submit(workItem(`more-${performance.now()}`.replace('.', '-')));
        return pullers.every(({ leased }, index) => leased.length > numBefore[index]!) ? true : undefined;
      }, 10_000);
      await eventually(async () => ((await numQueued()) === 0 ? true : undefined), 10_000);
    } finally {
      for (const puller of pullers) puller.stop();
      await Promise.all(running);
    }
  }

  test('delete it both before either makes it anew: nothing is lost and both go on', async () => {
    const [bothDecided, decide] = gateFor(2);
    const [bothDeleted, deleted] = gateFor(2);
    const around: Around = async (api, send) => {
      if (api === 'DELETE') {
        decide();
        await bothDecided;
        return send().finally(deleted);
      }
      if (api === 'CREATE') await bothDeleted;
      return send();
    };
    await holdBackAllBut('nobody');
    for (const id of ITEMS) await queue.submit(workItem(id));
    await pullAll([new Puller(await connectAround(around)), new Puller(await connectAround(around))]);
    // nats-server may confirm both deletions, if they come at the same time: then both say that they made it anew.
    expect([1, 2]).toContain(repairs.length);
  });

  test('one deletes what the other has made anew and taken from: nothing is lost and both go on', async () => {
    const [bothDecided, decide] = gateFor(2);
    const first = new Puller(
      await connectAround(async (api, send) => {
        if (api !== 'DELETE') return send();
        decide();
        await bothDecided;
        return send();
      }),
    );
    let numTaken = 0;
    const second = new Puller(
      await connectAround(async (api, send) => {
        if (api !== 'DELETE') return send();
        decide();
        await eventually(() => first.leased.length >= 2 || undefined, 10_000);
        numTaken = first.leased.length;
        return send();
      }),
    );
    await holdBackAllBut('nobody');
    for (const id of ITEMS) await queue.submit(workItem(id));
    await pullAll([first, second]);
    expect(repairs.length).toBe(2);
    expect(numTaken).toBeGreaterThanOrEqual(2);
  });

  test('one makes it anew between the deletion and the new consumer of the other: nothing is lost and both go on', async () => {
    const [isDeleted, deleted] = gateFor(1);
    const [isMade, made] = gateFor(1);
    const first = await connectAround(async (api, send) => {
      if (api === 'CREATE') await isMade;
      return api === 'DELETE' ? send().finally(deleted) : send();
    });
    const second = await connectAround(async (api, send) => {
      if (api === 'DELETE') await isDeleted;
      return api === 'CREATE' ? send().finally(made) : send();
    });
    await holdBackAllBut('nobody');
    for (const id of ITEMS) await queue.submit(workItem(id));
    await pullAll([new Puller(first), new Puller(second)]);
  });

  test('a consumer that the other has just made anew is in order', async () => {
    await holdBackAllBut('nobody');
    for (const id of ITEMS) await queue.submit(workItem(id));
    // One whose look comes when the other has made the consumer anew and not yet pulled from it.
    let numLooks = 0;
    const slow = new WorkQueue(
      await connectAround(async (api, send) => {
        if (api === 'INFO' && ++numLooks === 3) await eventually(() => repairs.length > 0 || undefined, 10_000);
        return send();
      }),
    );
    const onError = (error: LaminaError): unknown => repairs.push(error);
    const looking = async (): Promise<void> => {
      for (let looks = 0; looks < 2; looks++) expect(await slow.lease(LEASE_MS, onError)).toBeUndefined();
    };
    const repairing = async (): Promise<void> => {
      for (let looks = 0; looks < 2; looks++) {
        await sleep(200);
        expect(await lease()).toBeUndefined();
      }
    };
    await Promise.all([looking(), repairing()]);
    expect(repairs.length).toBe(1);
    for (const id of ITEMS) expect((await slow.lease(LEASE_MS, onError))?.item.id).toBe(id);
  });
});

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** Resolves when `pass` was called so often. */
function gateFor(numPasses: number): [passed: Promise<void>, pass: () => void] {
  let numPassed = 0;
  let open: () => void = () => undefined;
  const passed = new Promise<void>((resolve) => {
    open = resolve;
  });
  return [passed, () => (++numPassed === numPasses ? open() : undefined)];
}
