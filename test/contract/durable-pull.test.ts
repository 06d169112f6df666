/**
 * That no message waits for ever behind a consumer that does not offer it, on a real nats-server: one whose store lost what
 * a kill can lose, and one whose consumer holds back.
 */
import { cpSync, existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Bus, ensureStreams, type WorkLease, WorkQueue } from '@lamina/bus';
import { STREAMS, SUBJECTS } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import type { JetStreamManager } from 'nats';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { LEASE_MS, workItem } from './bus-bench.ts';
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

test('an item that nobody holds and that is not offered is offered by a new consumer', async () => {
  // It has not taken the messages in that it was made for, nor ever will.
  const { config } = await manager.consumers.info(name, durableConsumer);
  await manager.consumers.delete(name, durableConsumer);
  await manager.consumers.add(name, { ...config, filter_subject: SUBJECTS.work('held') });
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
