/** The life of an answer at a gateway, over a real nats-server: ids, lost tokens, cancels, deadlines, limits, the end. */
import type { WorkLease } from '@lamina/bus';
import { CLOCK_TOLERANCE_MS, packMessage, STREAMS, SUBJECTS, TOKENS_HEADER } from '@lamina/protocol';
import { describe, expect, test } from 'vitest';
import { EXECUTOR_ANSWER_MS } from '../../services/gateway/src/relay.ts';
import { MAX_AT_A_TIME } from '../../services/gateway/src/stray-cancels.ts';
import { renewStreams, workItem } from './bus-bench.ts';
import { dropEnded, token } from './gateway-bench.ts';
import { eventually } from './in-process.ts';
import {
  answer,
  ask,
  bus,
  gateway,
  lease,
  queue,
  restart,
  start,
  tokens,
  useGateway,
  workMessages,
} from './running-gateway.ts';
import { store } from './store-answer.ts';

useGateway();

describe('the same id twice is one request:', () => {
  const TOKENS = [token('same', 0), token('same', 1), token('same', 2, 'length')];

  test('both get the whole answer, and so does who asks when it has ended', async () => {
    const first = ask({ id: 'same', prompt: 'Hi' });
    const work = await lease();
    const second = ask({ id: 'same', prompt: 'Hi' });
    await answer(work);
    await Promise.all([first.final(), second.final()]);
    const third = ask({ id: 'same', prompt: 'Hi' });
    await third.final();
    for (const { messages } of [first, second, third]) expect(messages).toEqual(TOKENS);
    expect(await workMessages()).toBe(0);
  });

  test('at the same moment', async () => {
    const clients = Array.from({ length: 8 }, () => ask({ id: 'same-1', prompt: 'Hi' }));
    await answer(await lease());
    for (const client of clients) {
      await client.final();
      expect(client.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
    }
    expect(await queue.lease(1_000, () => undefined)).toBeUndefined();
  });

  test('each in the encoding that it asks in', async () => {
    const json = ask({ id: 'same-2', prompt: 'Hi' });
    const work = await lease();
    const msgpack = ask(packMessage({ id: 'same-2', prompt: 'Hi' }));
    await answer(work, 1);
    await Promise.all([json.final(), msgpack.final()]);
    expect(json.bodies[0]![0]).toBe(0x7b);
    expect(Buffer.from(msgpack.bodies[0]!)).toEqual(Buffer.from(packMessage(token('same-2', 0, 'length'))));
  });

  test('another gateway takes up what a dead one had', async () => {
    const lost = ask({ id: 'same-3', prompt: 'Hi' });
    const work = await lease();
    await store(tokens, [token('same-3', 0)]);
    await eventually(() => (lost.messages.length === 1 ? true : undefined));
    await gateway.crash();
    await start();
    const again = ask({ id: 'same-3', prompt: 'Hi' });
    await store(tokens, [token('same-3', 1)]);
    await store(tokens, [token('same-3', 2, 'stop')]);
    work.complete();
    await again.final();
    expect(again.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
    expect(lost.isFinal()).toBe(false);
  });

  test('the rest of an answer whose work item was lost is computed', async () => {
    await store(tokens, [token('same-4', 0), token('same-4', 1)]);
    const client = ask({ id: 'same-4', prompt: 'Hi' });
    const work = await lease();
    expect(work.item.isContinued).toBe(true);
    await store(tokens, [token('same-4', 2, 'stop')]);
    work.complete();
    await client.final();
    expect(client.messages.map(({ index }) => index)).toEqual([0, 1, 2]);
  });
});

describe('tokens', () => {
  test('that are published twice or lost on the way reach the client once and in order', async () => {
    const client = ask({ id: 'lossy', prompt: 'Hi' });
    const work = await lease();
    const stored = [0, 1, 2].map((index) => token('lossy', index));
    await store(tokens, stored.slice(0, 1));
    const unasked = (index: number): void => {
      const data = Buffer.from(JSON.stringify(token('lossy', index)));
      bus.publishWithHeaders(SUBJECTS.tokens('lossy'), data, { [TOKENS_HEADER]: `${index}-${index}` });
    };
    // Only the stream sees these two: as if the connection had dropped them.
    const manager = await bus.connection.jetstreamManager();
    await eventually(() => (client.messages.length === 1 ? true : undefined));
    unasked(0);
    await manager.streams.info(STREAMS.tokens.name);
    unasked(3);
    await store(tokens, stored.slice(1));
    await store(tokens, [token('lossy', 3)]);
    await store(tokens, [token('lossy', 4, 'stop')]);
    work.complete();
    await client.final();
    expect(client.messages.map((message) => message.index)).toEqual([0, 1, 2, 3, 4]);
  });
});

describe('cancel', () => {
  test('of a queued request is answered by the gateway; who takes its item is refused', async () => {
    const client = ask({ id: 'queued', prompt: 'Hi' });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    bus.publish(SUBJECTS.cancel('queued'), new Uint8Array(0));
    expect(await client.final()).toMatchObject({ id: 'queued', index: 0, token: null, finish_reason: 'cancelled' });
    await expect(tokens.append([token('queued', 0)], 'json', 0)).rejects.toMatchObject({ code: 'duplicate_id' });
    expect(await dropEnded(queue, tokens)).toMatchObject({ id: 'queued', finish_reason: 'cancelled' });
    const replayed: Uint8Array[] = [];
    const replay = await tokens.replay('queued', (data) => replayed.push(data));
    await eventually(() => (replayed.length === 1 ? true : undefined));
    replay.unsubscribe();
  });

  test('of a request whose executor stores its first token in the same moment: one end, whoever wins', async () => {
    const rounds = Array.from({ length: 12 }, (_, index) => ({ id: `moment-${index}`, delayMs: 150 + 30 * index }));
    const clients = new Map(rounds.map(({ id }) => [id, ask({ id, prompt: 'Hi' })]));
    const works = new Map<string, WorkLease>();
    for (const _ of rounds) {
      const work = await lease();
      works.set(work.item.id, work);
    }
    const play = async ({ id, delayMs }: (typeof rounds)[number]): Promise<string> => {
      bus.publish(SUBJECTS.cancel(id), new Uint8Array(0));
      await new Promise((resolve) => setTimeout(resolve, delayMs));
      const end = { ...token(id, 1, 'cancelled'), token: null, text: '' };
      const winner = await tokens.append([token(id, 0)], 'json', 0).then(
        async (sequence) => {
          await tokens.append([end], 'json', sequence!);
          return 'executor';
        },
        () => 'gateway',
      );
      const last = await clients.get(id)!.final();
      const { tokens: stored } = await tokens.stored(id);
      expect(stored.map(({ index }) => index)).toEqual(winner === 'executor' ? [0, 1] : [0]);
      expect(stored.filter(({ finish_reason }) => finish_reason !== null)).toHaveLength(1);
      expect(last).toEqual(stored.at(-1));
      works.get(id)!.complete();
      return winner;
    };
    const winners = await Promise.all(rounds.map(play));
    // Otherwise the race was none.
    expect(new Set(winners).size).toBe(2);
  });

  test('of a running request is answered by the executor', async () => {
    const client = ask({ id: 'running', prompt: 'Hi' });
    const work = await lease();
    await store(tokens, [token('running', 0)]);
    bus.publish(SUBJECTS.cancel('running'), new Uint8Array(0));
    await store(tokens, [{ ...token('running', 1, 'cancelled'), token: null, text: '' }]);
    work.complete();
    expect(await client.final()).toMatchObject({ index: 1, finish_reason: 'cancelled' });
  });

  test('of a request that no gateway relays and no executor has is answered all the same', async () => {
    const lost = ask({ id: 'stray', prompt: 'Hi' });
    await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
    await gateway.crash();
    await start();
    let numReads = 0;
    bus.connection.subscribe('$JS.API.>', { callback: () => numReads++ });
    // Asked a thousand times, the gateway looks for it as often as asked once.
    for (let time = 0; time < 1_000; time++) bus.publish(SUBJECTS.cancel('stray'), new Uint8Array(0));
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    expect(numReads).toBeGreaterThan(0);
    expect(numReads).toBeLessThan(20);
    await eventually(async () => ((await tokens.endOf('stray'))?.isComplete ? true : undefined));
    expect(await dropEnded(queue, tokens)).toMatchObject({ id: 'stray', finish_reason: 'cancelled' });
    expect(lost.isFinal()).toBe(false);
  });

  test('that has to wait behind others ends nothing that was submitted after it', async () => {
    const others = Array.from({ length: 6 * MAX_AT_A_TIME }, (_, index) => `other-${index}`);
    const submit = (id: string) => queue.submit(workItem(id, { submittedAtMs: Date.now() }));
    await Promise.all(others.map(submit));
    for (const id of [...others, 'later']) bus.publish(SUBJECTS.cancel(id), new Uint8Array(0));
    await bus.flush();
    await new Promise((resolve) => setTimeout(resolve, CLOCK_TOLERANCE_MS + 500));
    await submit('later');
    await eventually(async () => ((await tokens.endOf(others.at(-1)!))?.isComplete ? true : undefined), 15_000);
    // Its turn has come by now, or comes when one more of the others has ended.
    await new Promise((resolve) => setTimeout(resolve, 3 * EXECUTOR_ANSWER_MS));
    expect(await tokens.endOf('later')).toBeUndefined();
    await renewStreams(bus);
  });

  test('of an unknown or malformed id does nothing', async () => {
    bus.publish(SUBJECTS.cancel('nobody'), new Uint8Array(0));
    bus.publish(SUBJECTS.cancel('caf\u00e9'), new Uint8Array(0));
    const client = ask('Hi');
    await answer(await lease(), 1);
    expect((await client.final()).finish_reason).toBe('length');
  });
});

test('a deadline that passes in the queue is answered', async () => {
  const client = ask({ prompt: 'Hi', deadline_ms: 1_000 });
  await eventually(async () => ((await workMessages()) === 1 ? true : undefined));
  const last = await client.final();
  expect(last.error?.code).toBe('deadline_exceeded');
  expect(await dropEnded(queue, tokens)).toEqual(last);
});

test('more prompts than may be open are refused as overloaded', async () => {
  await restart(['--max-open-requests', '2']);
  const open = [ask('Hi'), ask('Hi')];
  const works = [await lease(), await lease()];
  expect((await ask('Hi').final()).error?.code).toBe('overloaded');
  for (const work of works) await answer(work, 1);
  for (const client of open) await client.final();
});

test('a gateway that stops answers what it took first', async () => {
  const client = ask('Hi');
  const work = await lease();
  const stopped = gateway.stop();
  await answer(work);
  expect((await client.final()).finish_reason).toBe('length');
  await stopped;
  await start();
});
