/**
 * Reply subjects that a client chooses: nats-server answers there by itself and asks no permission of its answer, so what
 * reads like a reply must not do as a call. Every JetStream call, on a real server, as the reply of everything that a
 * durable-client may send.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Bus, ensureStreams, TokenStream, WorkQueue } from '@lamina/bus';
import { writeNatsUsers } from '@lamina/cli';
import { ENDPOINTS, permissionsOf, SERVICE_NAMES, STREAMS, SUBJECTS, TOKENS_HEADER } from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { connect, consumerOpts, type JetStreamManager, type NatsConnection } from 'nats';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { workItem } from './bus-bench.ts';
import { token } from './gateway-bench.ts';
import { store } from './store-answer.ts';

let directory: string;
let server: NatsServer;
let operator: NatsConnection;
let manager: JetStreamManager;
let attacker: NatsConnection;
let service: Bus;

const login = (user: string): Promise<NatsConnection> =>
  connect({
    servers: server.url,
    user,
    pass: readFileSync(join(directory, user, 'password'), 'utf8').trim(),
    inboxPrefix: `_INBOX.${user}`,
  });

const ITEM = workItem('waits');

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'lamina-replies-'));
  const usersFile = await writeNatsUsers(directory, {
    clients: [{ name: 'dora', role: 'durable-client' }],
    anonymous: null,
  });
  server = await startNatsServer({ configuration: readFileSync(usersFile, 'utf8') });
  const access = { user: 'gateway', passwordFile: join(directory, 'gateway', 'password') };
  service = await Bus.connect(
    { url: server.url, name: 'test', connectTimeoutMs: 5_000, access },
    { onError: () => undefined },
  );
  await ensureStreams(service);
  operator = await login('operator');
  manager = await operator.jetstreamManager();
  attacker = await login('dora');
  await attacker.jetstream().publish(SUBJECTS.prompts, 'Hi');
  const queue = new WorkQueue(service);
  const tokens = new TokenStream(service, () => undefined);
  // As many of each as sequences in what the server will say.
  for (let index = 0; index < 200; index++) {
    await store(tokens, [token('kept', index)]);
    await queue.submit({ ...ITEM, id: `waits-${index}` });
  }
});
afterEach(async () => {
  await Promise.all([operator.close(), attacker.close(), service.close()]);
  await server.stop();
  rmSync(directory, { recursive: true, force: true });
});

const CALLS = [
  '$JS.API.INFO',
  ...['NAMES', 'LIST', 'CREATE.x', 'TEMPLATE.CREATE.x'].map((call) => `$JS.API.STREAM.${call}`),
  '$JS.API.ACCOUNT.PURGE.x',
  '$JS.API.META.LEADER.STEPDOWN',
  '$JS.API.SERVER.REMOVE',
  ...Object.values(STREAMS).flatMap(({ name }) => [
    ...['CREATE', 'UPDATE', 'INFO', 'DELETE', 'PURGE', 'SNAPSHOT', 'RESTORE', 'MSG.GET', 'MSG.DELETE'].map(
      (call) => `$JS.API.STREAM.${call}.${name}`,
    ),
    ...['PEER.REMOVE', 'LEADER.STEPDOWN'].map((call) => `$JS.API.STREAM.${call}.${name}`),
    ...['CREATE', 'NAMES', 'LIST'].map((call) => `$JS.API.CONSUMER.${call}.${name}`),
    `$JS.API.DIRECT.GET.${name}`,
    `$JS.API.CONSUMER.CREATE.${name}.new`,
    `$JS.API.CONSUMER.DURABLE.CREATE.${name}.new`,
    ...['INFO', 'DELETE', 'MSG.NEXT', 'LEADER.STEPDOWN', 'PAUSE', 'UNPIN'].flatMap((call) =>
      ['gateways', 'dense-executors', 'mine'].map((consumer) => `$JS.API.CONSUMER.${call}.${name}.${consumer}`),
    ),
    `$JS.ACK.${name}.dense-executors.1.1.1.1.1`,
    `$JS.ACK.${name}.gateways.1.1.1.1.1`,
    `$JS.FC.${name}.dense-executors.x`,
  ]),
];

/** All that must not change, whatever a durable-client sends: prompts are added, answers and work are not touched. */
async function cluster(): Promise<unknown> {
  const streams: unknown[] = [];
  for await (const { config, state } of manager.streams.list()) {
    const consumers: unknown[] = [];
    for await (const each of manager.consumers.list(config.name)) {
      if (each.name === 'mine') continue;
      const { delivered, ack_floor, num_ack_pending } = each;
      consumers.push({ name: each.name, config: each.config, delivered, ack_floor, num_ack_pending });
    }
    const { first_seq, last_seq, messages } = state;
    const kept = config.name === STREAMS.prompts.name ? { first_seq } : { first_seq, last_seq, messages };
    streams.push({ config, kept, consumers });
  }
  return streams;
}

async function settle(): Promise<void> {
  await attacker.flush();
  await operator.flush();
  await new Promise((resolve) => setTimeout(resolve, 300));
}

test('a stored prompt’s confirmation does as no call of JetStream', async () => {
  const before = await cluster();
  for (let round = 0; round < 2; round++)
    for (const reply of CALLS) attacker.publish(SUBJECTS.prompts, Buffer.from('Hi'), { reply });
  await settle();
  // It was stored each time, so it was confirmed each time; the server stores nothing that wants an acknowledgement.
  const stored = 1 + 2 * CALLS.filter((call) => !call.startsWith('$JS.ACK')).length;
  expect((await manager.streams.info(STREAMS.prompts.name)).state.messages).toBe(stored);
  expect(await cluster()).toEqual(before);
});

test('what JetStream answers a durable-client does as no call of JetStream', async () => {
  // A consumer of its own, which it may make.
  const name = STREAMS.tokens.name;
  await manager.consumers.add(name, { durable_name: 'mine', deliver_subject: '_INBOX.dora.x', idle_heartbeat: 1e8 });
  const before = await cluster();
  expect(GRANTED.length).toBeGreaterThan(5);
  const bodies = [
    '',
    '{"seq":1}',
    '{"last_by_subj":"lamina.v1.tokens.kept"}',
    '{"stream_name":"LAMINA_TOKENS","config":{}}',
  ];
  for (const call of GRANTED)
    for (const reply of CALLS)
      for (const body of bodies)
        if (!/CONSUMER\.(CREATE|DELETE)/.test(call)) attacker.publish(call, Buffer.from(body), { reply });
  await settle();
  expect(await cluster()).toEqual(before);
});

test('a durable-client submits prompts, and reads an answer from its start with what nats.js makes of that', async () => {
  const jetstream = (await attacker.jetstreamManager()).jetstream();
  expect(await jetstream.publish(SUBJECTS.prompts, 'Hi')).toMatchObject({ stream: STREAMS.prompts.name, seq: 2 });
  const options = consumerOpts();
  options.orderedConsumer();
  const names: (string | undefined)[] = [];
  const reading = await jetstream.subscribe(SUBJECTS.tokens('kept'), options);
  for await (const { headers } of reading) if (names.push(headers?.get(TOKENS_HEADER)) === 200) break;
  reading.unsubscribe();
  expect(names).toEqual(Array.from({ length: 200 }, (_, index) => `${index}-${index}`));
});

/** What a durable-client may call, so that the server answers where it likes. */
const GRANTED = CALLS.filter((call) =>
  permissionsOf('durable-client').publish.some((pattern) =>
    new RegExp(
      `^${pattern.replaceAll('.', '\\.').replaceAll('$', '\\$').replace(/>$/, '.*').replaceAll('*', '[^.]*')}$`,
    ).test(call),
  ),
);

test('nothing that the server answers a durable-client is taken for a work item', async () => {
  const state = async (): Promise<unknown> => (await manager.streams.info(STREAMS.work.name)).state;
  const before = await state();
  const guesses = ['lamina.v1.work.p2', 'lamina.v1.work.x.p2', 'lamina.v1.work.p2.x'];
  for (const call of [...GRANTED, SUBJECTS.prompts])
    for (const reply of guesses) attacker.publish(call, Buffer.from('Hi'), { reply });
  await settle();
  const queue = new WorkQueue(service);
  expect([await queue.has('p2'), await queue.waiting()]).toEqual([false, 200]);
  expect(await state()).toEqual(before);
  await queue.submit({ ...ITEM, id: 'p2' });
  expect(await queue.has('p2')).toBe(true);
});

test('where work items go is told to no durable-client', async () => {
  const [subject] = (await manager.streams.info(STREAMS.work.name)).config.subjects;
  const key = subject!.split('.').at(-2)!;
  expect(key).toMatch(/^[\w-]{20}$/);
  const said: string[] = [];
  const hear = (_: unknown, { subject, data }: { subject: string; data: Uint8Array }): void => {
    said.push(`${subject} ${Buffer.from(data).toString()}`);
  };
  attacker.subscribe('_INBOX.dora.>', { callback: hear });
  attacker.subscribe(SUBJECTS.tokens('*'), { callback: hear });
  const bodies = [
    '',
    '{"subject":"lamina.v1.work.>"}',
    '{"stream_name":"LAMINA_TOKENS","config":{"name":"x","deliver_subject":"lamina.v1.work.x.y"}}',
    '{"subjects_filter":">","deleted_details":true}',
  ];
  for (const call of [...GRANTED, SUBJECTS.prompts])
    for (const body of bodies) attacker.publish(call, Buffer.from(body), { reply: '_INBOX.dora.said' });
  await new WorkQueue(service).submit({ ...ITEM, id: 'told' });
  await settle();
  expect(said.length).toBeGreaterThan(GRANTED.length);
  expect(said.filter((each) => each.includes(key) || each.includes(key.slice(0, 8)))).toEqual([]);
});

test('what a durable-client has the server store grows the stream of answers by no more than it sends', async () => {
  const bytes = async (): Promise<number> => (await manager.streams.info(STREAMS.tokens.name)).state.bytes;
  const reply = SUBJECTS.tokens('junk');
  const padding = 'x'.repeat(4_000);
  const consumer = {
    name: 'mine',
    description: padding,
    deliver_subject: '_INBOX.dora.x',
    ack_policy: 'none',
    inactive_threshold: 60e9,
  };
  const make = { stream_name: STREAMS.tokens.name, config: consumer };
  await operator.request(`$JS.API.CONSUMER.CREATE.${STREAMS.tokens.name}.mine`, JSON.stringify(make));
  const growths: Record<string, number> = {};
  for (const call of GRANTED)
    for (const body of ['', `{"last_by_subj":"${reply}"}`, '{"subjects_filter":">"}']) {
      const before = await bytes();
      let sent = 0;
      // What is stored may be asked for again, and then stored as a part of what is answered.
      for (let round = 0; round < 30; round++) {
        attacker.publish(call, Buffer.from(body), { reply });
        sent += call.length + body.length + reply.length;
        await attacker.flush();
      }
      await settle();
      growths[`${call} ${body}`] = ((await bytes()) - before) / sent;
    }
  expect(Math.max(...Object.values(growths))).toBeGreaterThan(1);
  expect(Object.entries(growths).filter(([, growth]) => growth > 16)).toEqual([]);
}, 60_000);

test('what JetStream pushes to a subject of a durable-client’s choice does as no call of JetStream', async () => {
  const before = await cluster();
  const inbox = '_INBOX.dora.made';
  const made: string[] = [];
  attacker.subscribe(inbox, { callback: (_, { data }) => made.push(Buffer.from(data).toString()) });
  const targets = CALLS.filter((call) => /PURGE|DELETE|UPDATE|REMOVE|ACK/.test(call));
  for (const [index, deliver] of targets.entries()) {
    const config = { name: `push-${index}`, deliver_subject: deliver, ack_policy: 'none', deliver_policy: 'all' };
    const flow = { flow_control: true, idle_heartbeat: 100_000_000, headers_only: index % 2 === 0, mem_storage: true };
    const body = JSON.stringify({ stream_name: STREAMS.tokens.name, config: { ...config, ...flow } });
    const call = `$JS.API.CONSUMER.CREATE.${STREAMS.tokens.name}.push-${index}`;
    attacker.publish(call, Buffer.from(body), { reply: inbox });
  }
  await settle();
  await settle();
  expect(made).toHaveLength(targets.length);
  // It may make consumers of answers; nothing else has changed, and none of them was pushed anything.
  const after: unknown = JSON.parse(
    JSON.stringify(await cluster(), (key, value) =>
      key === 'consumers' ? value.filter((each: { name: string }) => !each.name.startsWith('push-')) : value,
    ),
  );
  expect(after).toEqual(JSON.parse(JSON.stringify(before)));
});

test('a durable-client can neither pull nor acknowledge: both are answered with an empty message wherever it likes', async () => {
  await manager.consumers.add(STREAMS.tokens.name, { durable_name: 'mine', ack_policy: 'explicit' as never });
  const before = await cluster();
  const refused: string[] = [];
  void (async () => {
    for await (const { permissionContext } of attacker.status())
      if (permissionContext !== undefined) refused.push(permissionContext.subject);
  })();
  const reply = `$JS.API.STREAM.DELETE.${STREAMS.work.name}`;
  const pull = `$JS.API.CONSUMER.MSG.NEXT.${STREAMS.tokens.name}.mine`;
  const ack = `$JS.ACK.${STREAMS.tokens.name}.mine.1.1.1.1.1`;
  attacker.publish(pull, Buffer.from('{"no_wait":true,"batch":300}'), { reply });
  for (const body of ['+ACK', '+NXT', '-NAK', '+TERM']) attacker.publish(ack, Buffer.from(body), { reply });
  await settle();
  expect(new Set(refused)).toEqual(new Set([pull, ack]));
  expect(await cluster()).toEqual(before);
  // Not the permission, the server would have: as somebody who may pull.
  operator.publish(pull, Buffer.from('{"no_wait":true,"batch":300}'), { reply });
  await operator.flush();
  await settle();
  await expect(manager.streams.info(STREAMS.work.name)).rejects.toThrow(/stream not found/);
});

test('what a service says of itself goes to no stream and does as no call', async () => {
  const name = SERVICE_NAMES.gateway;
  await service.service.announce({ name, version: '0.1.0', description: '', metadata: {}, stats: () => ({}) });
  await service.flush();
  const before = await cluster();
  const kinds = ['', `.${name}`, `.${name}.${service.service.instanceId}`];
  const asked = ['PING', 'INFO', 'STATS'].flatMap((verb) => kinds.map((kind) => `$SRV.${verb}${kind}`));
  const subjects = [SUBJECTS.work('k', 'x'), SUBJECTS.tokens('kept'), SUBJECTS.tokens('x'), ...CALLS];
  for (const subject of asked)
    for (const reply of subjects) for (const body of ['', '{"batch":1}']) attacker.publish(subject, body, { reply });
  await settle();
  expect(await cluster()).toEqual(before);
  // It answers nevertheless.
  expect((await attacker.request('$SRV.PING')).json()).toMatchObject({ name, id: service.service.instanceId });
});

test('where a service is answered cannot be guessed from what it says of itself', async () => {
  const manager = await login('kv-manager');
  const replies: string[] = [];
  manager.subscribe(ENDPOINTS.kvStatus.subject, { callback: (_, { reply }) => replies.push(reply ?? '') });
  await manager.flush();
  await service.service.announce({ name: 'x', version: '0.1.0', description: '', metadata: {}, stats: () => ({}) });
  await service.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 100 }).catch(() => undefined);
  await service.requestAll(ENDPOINTS.kvStatus.subject, 100);
  await manager.close();
  expect(replies).toHaveLength(2);
  // nats.js makes ids, inboxes and request tokens from one sequence, of which the first 12 characters never change.
  const sequence = service.service.instanceId.slice(0, 12);
  for (const reply of replies) {
    const [inbox, user, secret, ...rest] = reply.split('.');
    expect([inbox, user]).toEqual(['_INBOX', 'gateway']);
    expect(secret).toMatch(/^[\w-]{20}$/);
    expect([secret, rest[0]].map((token) => token?.startsWith(sequence))).toEqual([false, true]);
  }
});

test('a gateway hears which of its answers nobody listened to, and where it hears that is not where it is answered', async () => {
  const unheard: string[] = [];
  const subjectOf = service.watchUnheard((name) => unheard.push(name));
  const received: string[] = [];
  const subscription = attacker.subscribe('_INBOX.dora.mine', {
    callback: (_, { reply }) => received.push(reply ?? ''),
  });
  await attacker.flush();
  service.publishWithHeaders('_INBOX.dora.mine', new Uint8Array(0), {}, subjectOf('a.0'));
  await service.flush();
  await attacker.flush();
  subscription.unsubscribe();
  await attacker.flush();
  service.publishWithHeaders('_INBOX.dora.mine', new Uint8Array(0), {}, subjectOf('a.1'));
  await service.flush();
  expect([received, unheard]).toEqual([[subjectOf('a.0')], ['a.1']]);
  // The server tells a client what it published itself and nobody heard, and tells it to nobody else.
  attacker.publish('_INBOX.nobody', '', { reply: subjectOf('forged') });
  attacker.publish(SUBJECTS.cancel('x'), '', { reply: subjectOf('forged') });
  attacker.publish(subjectOf('forged'));
  await settle();
  expect(unheard).toEqual(['a.1']);
  const [, , secret] = Object(service.connection).options.inboxPrefix.split('.');
  expect(secret).toMatch(/^[\w-]{20}$/);
  expect(subjectOf('x')).not.toContain(secret);
});
