import { ACK_WAIT_MS, ensureStreams, type WorkLease, WorkQueue } from '@lamina/bus';
import { packMessage, STREAMS } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import { beforeEach, describe, expect, test } from 'vitest';
import { client, LEASE_MS, numQueued, renewStreams, server, useBus, workItem, workSubject } from './bus-bench.ts';
import { eventually } from './in-process.ts';

useBus();

describe('the work queue', () => {
  let gateway: WorkQueue;
  let executor: WorkQueue;
  let unreadable: LaminaError[];

  beforeEach(async () => {
    await renewStreams(client);
    gateway = new WorkQueue(client);
    executor = new WorkQueue(server);
    unreadable = [];
  });

  function lease(waitMs = 5000): Promise<WorkLease | undefined> {
    return executor.lease(waitMs, (error) => unreadable.push(error));
  }

  async function leased(): Promise<WorkLease> {
    const work = await lease();
    if (work === undefined) throw new Error('nothing in the queue');
    return work;
  }

  test('an item is leased as it was submitted, stays until it is completed, and is offered once', async () => {
    const item = workItem('once', { tokenIds: [0, 70_000], logprobs: 3, deadlineAtMs: 1.5, encoding: 'msgpack' });
    await gateway.submit(item);
    const work = await leased();
    expect([work.item, work.deliveryCount]).toEqual([item, 1]);
    work.renew();
    expect(await lease(LEASE_MS)).toBeUndefined();
    expect(await numQueued(client)).toBe(1);
    work.complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
  });

  test('looking an item up is one request to JetStream, counting those that wait two', async () => {
    await gateway.submit(workItem('looked-up'));
    const asked: string[] = [];
    const listening = server.subscribe('$JS.API.>', ({ subject }) => asked.push(subject));
    await server.flush();
    const { name, durableConsumer } = STREAMS.work;
    expect([await gateway.has('looked-up'), await gateway.has('unknown'), await gateway.waiting()]).toEqual([
      true,
      false,
      1,
    ]);
    await server.flush();
    listening.unsubscribe();
    expect(asked).toEqual([
      `$JS.API.STREAM.MSG.GET.${name}`,
      `$JS.API.STREAM.MSG.GET.${name}`,
      `$JS.API.CONSUMER.INFO.${name}.${durableConsumer}`,
      `$JS.API.STREAM.INFO.${name}`,
    ]);
  });

  test('items come in the order of their submission, spread over who asks', async () => {
    const sequences = await Promise.all(['q1', 'q2', 'q3'].map((id) => gateway.submit(workItem(id))));
    expect(sequences).toEqual([sequences[0], sequences[0]! + 1, sequences[0]! + 2]);
    const other = new WorkQueue(client);
    const first = await leased();
    const second = await other.lease(LEASE_MS, () => undefined);
    const third = await leased();
    expect([first, second, third].map((work) => work?.item.id)).toEqual(['q1', 'q2', 'q3']);
    for (const work of [first, second, third]) work?.complete();
  });

  test('a released item is offered again at once, and counted', async () => {
    await gateway.submit(workItem('released'));
    for (const count of [1, 2]) {
      const work = await leased();
      expect([work.item.id, work.deliveryCount]).toEqual(['released', count]);
      work.release();
    }
    const last = await leased();
    expect([last.item.id, last.deliveryCount]).toEqual(['released', 3]);
    last.complete();
    expect(await lease(LEASE_MS)).toBeUndefined();
  });

  test('an item whose executor died is offered again when its lease lapses; a renewed one is not', async () => {
    const manager = await client.connection.jetstreamManager();
    const { durableConsumer, name } = STREAMS.work;
    const waitNs = async (): Promise<number> => (await manager.consumers.info(name, durableConsumer)).config.ack_wait!;
    expect(await waitNs()).toBe(ACK_WAIT_MS * 1e6);
    // Half a minute is too long for a test.
    await manager.consumers.update(name, durableConsumer, { ack_wait: 600e6 });
    await gateway.submit(workItem('renewed'));
    await gateway.submit(workItem('lapsed'));
    const renewed = await leased();
    const lapsed = await leased();
    const renewing = setInterval(() => renewed.renew(), 100);
    const again = await leased();
    expect([again.item.id, again.deliveryCount]).toEqual([lapsed.item.id, 2]);
    again.complete();
    expect(await lease(LEASE_MS)).toBeUndefined();
    clearInterval(renewing);
    renewed.complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    await ensureStreams(client);
    expect(await waitNs()).toBe(ACK_WAIT_MS * 1e6);
  });

  test('an id that waits or was completed a short time ago is not taken again', async () => {
    await gateway.submit(workItem('twice'));
    const again = { code: 'duplicate_id', message: expect.stringContaining('"twice"') };
    await expect(gateway.submit(workItem('twice'))).rejects.toMatchObject(again);
    expect(await numQueued(client)).toBe(1);
    (await leased()).complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    await expect(gateway.submit(workItem('twice'))).rejects.toMatchObject(again);
    expect(await lease(LEASE_MS)).toBeUndefined();
  });

  test('an id that waits is not taken again, however long it has waited', async () => {
    // Stored without a message id, so the server's window of duplicates does not know it.
    client.publish(await workSubject(client, 'old'), packMessage(workItem('old')));
    await eventually(async () => ((await numQueued(client)) === 1 ? true : undefined));
    await expect(gateway.submit(workItem('old'))).rejects.toMatchObject({ code: 'duplicate_id' });
    (await leased()).complete();
  });

  test('a full queue is overloaded, and takes prompts again when one is done', async () => {
    const manager = await client.connection.jetstreamManager();
    await manager.streams.update(STREAMS.work.name, { max_msgs: 1 });
    await gateway.submit(workItem('full-1'));
    await expect(gateway.submit(workItem('full-2'))).rejects.toMatchObject({ code: 'overloaded', retryable: true });
    (await leased()).complete();
    await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    await gateway.submit(workItem('full-3'));
    (await leased()).complete();
    await ensureStreams(client);
    expect((await manager.streams.info(STREAMS.work.name)).config.max_msgs).toBeGreaterThan(1);
  });

  test('a prompt that is larger than a message is refused for good', async () => {
    const tokenIds = new Array<number>(client.maxPayloadBytes).fill(1);
    await expect(gateway.submit(workItem('large', { tokenIds }))).rejects.toMatchObject({
      code: 'invalid_request',
      message: expect.stringContaining('max_payload'),
    });
  });

  test('an unreadable item is reported and removed, and the next one is leased', async () => {
    const bad = [Buffer.from('hello'), packMessage({ id: 'bad' }), packMessage(workItem('bad', { tokenIds: [] }))];
    for (const body of bad) {
      client.publish(await workSubject(client, 'bad'), body);
      await eventually(async () => ((await numQueued(client)) === 1 ? true : undefined));
      expect(await lease()).toBeUndefined();
      await eventually(async () => ((await numQueued(client)) === 0 ? true : undefined));
    }
    expect(unreadable.map(({ code }) => code)).toEqual(bad.map(() => 'protocol_violation'));
    await gateway.submit(workItem('good'));
    (await leased()).complete();
  });

  test('an item is there from its submission to its completion, leased or not', async () => {
    expect(await gateway.has('there')).toBe(false);
    await gateway.submit(workItem('there'));
    expect(await gateway.has('there')).toBe(true);
    const work = await leased();
    expect(await gateway.has('there')).toBe(true);
    work.complete();
    await eventually(async () => ((await gateway.has('there')) ? undefined : true));
  });

  test('an item tells when it was submitted, by its gateway or by the server, whichever is earlier', async () => {
    const beforeMs = Date.now();
    expect(await gateway.submittedAtMs('told')).toBeUndefined();
    await gateway.submit(workItem('told', { submittedAtMs: beforeMs - 60_000 }));
    await gateway.submit(workItem('fast-clock', { submittedAtMs: beforeMs + 60_000 }));
    expect(await gateway.submittedAtMs('told')).toBe(beforeMs - 60_000);
    const byServerMs = await gateway.submittedAtMs('fast-clock');
    expect(byServerMs).toBeGreaterThanOrEqual(beforeMs);
    expect(byServerMs).toBeLessThanOrEqual(Date.now());
    await client.connection.jetstream().publish(await workSubject(client, 'unreadable'), 'x');
    expect(await gateway.submittedAtMs('unreadable')).toBeUndefined();
  });

  test('without the stream a prompt is not taken', async () => {
    const manager = await client.connection.jetstreamManager();
    await manager.streams.delete(STREAMS.work.name);
    await expect(gateway.submit(workItem('nowhere'))).rejects.toMatchObject({ code: 'unavailable' });
    await ensureStreams(client);
    // Under another key.
    await gateway.submit(workItem('nowhere'));
    expect((await leased()).item.id).toBe('nowhere');
  });

  test('the queue goes on in a stream that was made anew, or that an older Lamina made', async () => {
    const manager = await client.connection.jetstreamManager();
    const subjects = async (): Promise<string[]> => (await manager.streams.info(STREAMS.work.name)).config.subjects;
    const keyed = expect.stringMatching(/^lamina\.v1\.work\.[\w-]{20}\.\*$/);
    await gateway.submit(workItem('first'));
    const before = await subjects();
    expect(before).toEqual([keyed]);
    await ensureStreams(server);
    expect(await subjects()).toEqual(before);
    await renewStreams(client);
    expect(await subjects()).toEqual([keyed]);
    expect(await subjects()).not.toEqual(before);
    expect(await gateway.has('first')).toBe(false);
    await gateway.submit(workItem('second'));
    (await leased()).complete();
    await manager.streams.update(STREAMS.work.name, { subjects: ['lamina.v1.work.*'] });
    await expect(gateway.submit(workItem('third'))).rejects.toMatchObject({ code: 'unavailable' });
    client.publish('lamina.v1.work.old', packMessage(workItem('old')));
    await ensureStreams(client);
    await gateway.submit(workItem('third'));
    expect([(await leased()).item.id, (await leased()).item.id]).toEqual(['old', 'third']);
    expect(await gateway.has('third')).toBe(true);
  });
});
