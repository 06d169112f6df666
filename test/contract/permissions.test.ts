/**
 * The users of a real nats-server: every role tries every subject of the table and every JetStream call, to publish and to
 * subscribe, and the server refuses exactly what the table does not grant.
 */
import { mkdtempSync, readFileSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Bus } from '@lamina/bus';
import { writeNatsUsers } from '@lamina/cli';
import {
  ENDPOINTS,
  EVENTS,
  permissionsOf,
  ROLES,
  type Role,
  SERVICE_NAMES,
  STREAMS,
  SUBJECT_NOTES,
  SUBJECTS,
} from '@lamina/protocol';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { connect, type NatsConnection } from 'nats';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';

const directory = mkdtempSync(join(tmpdir(), 'lamina-users-'));
let server: NatsServer;
const open: NatsConnection[] = [];

beforeAll(async () => {
  const usersFile = await writeNatsUsers(directory, {
    clients: [
      { name: 'alice', role: 'client' },
      { name: 'bob', role: 'client' },
      { name: 'dora', role: 'durable-client' },
    ],
    anonymous: 'client',
  });
  server = await startNatsServer({ configuration: readFileSync(usersFile, 'utf8') });
});
afterEach(async () => {
  await Promise.all(open.splice(0).map((connection) => connection.close()));
});
afterAll(async () => {
  await server.stop();
  rmSync(directory, { recursive: true, force: true });
});

const USER_OF: Readonly<Record<Role, string>> = {
  client: 'alice',
  'durable-client': 'dora',
  gateway: 'gateway',
  'dense-executor': 'dense-executor',
  'attention-shard': 'attention-shard',
  'kv-manager': 'kv-manager',
  operator: 'operator',
};

const passwordOf = (user: string): string => readFileSync(join(directory, user, 'password'), 'utf8').trim();

async function login(user?: string): Promise<NatsConnection> {
  const connection = await connect({
    servers: server.url,
    reconnect: false,
    ...(user !== undefined && { user, pass: passwordOf(user), inboxPrefix: `_INBOX.${user}` }),
  });
  open.push(connection);
  return connection;
}

/** The subjects that the server refused while `use` ran. */
async function refusals(connection: NatsConnection, use: () => void): Promise<Set<string>> {
  const refused = new Set<string>();
  void (async () => {
    for await (const status of connection.status()) {
      if (status.permissionContext !== undefined) refused.add(status.permissionContext.subject);
    }
  })();
  use();
  await connection.flush();
  await new Promise((resolve) => setImmediate(resolve));
  return refused;
}

/** NATS's rule for subject patterns, written anew. */
function matches(pattern: string, subject: string): boolean {
  const [left, right] = [pattern.split('.'), subject.split('.')];
  for (const [at, token] of left.entries()) {
    if (token === '>') return right.length > at;
    if (right[at] === undefined || (token !== '*' && token !== right[at])) return false;
  }
  return left.length === right.length;
}

const TABLE = [...Object.values(ENDPOINTS), ...Object.values(EVENTS), ...SUBJECT_NOTES].map(({ subject }) =>
  subject.replaceAll(/<[^>]+>/g, 'x'),
);
const API_CALLS = [
  '$JS.API.INFO',
  '$JS.API.STREAM.NAMES',
  '$JS.API.STREAM.LIST',
  ...[...Object.values(STREAMS).map(({ name }) => name), 'OTHER'].flatMap((name) => [
    ...['CREATE', 'UPDATE', 'INFO', 'DELETE', 'PURGE', 'SNAPSHOT', 'RESTORE', 'MSG.GET', 'MSG.DELETE'].map(
      (call) => `$JS.API.STREAM.${call}.${name}`,
    ),
    `$JS.API.DIRECT.GET.${name}`,
    `$JS.API.CONSUMER.CREATE.${name}`,
    ...['x', 'dense-executors'].flatMap((consumer) =>
      ['CREATE', 'DURABLE.CREATE', 'INFO', 'DELETE', 'MSG.NEXT'].map(
        (call) => `$JS.API.CONSUMER.${call}.${name}.${consumer}`,
      ),
    ),
    `$JS.ACK.${name}.dense-executors.1.1.1.1.1`,
    `$JS.FC.${name}.x.y`,
  ]),
];
const SRV = [
  '$SRV.PING',
  ...Object.values(SERVICE_NAMES).flatMap((name) => [`$SRV.STATS.${name}`, `$SRV.INFO.${name}.x`]),
];
const INBOXES = [...Object.values(USER_OF), 'bob'].map((user) => `_INBOX.${user}.x`);
const EVERYTHING = [
  ...new Set([...TABLE, ...API_CALLS, ...SRV, ...INBOXES, '$SYS.REQ.SERVER.PING', 'other', 'lamina.v1.x']),
];

test.each(ROLES)('the server refuses a %s what the table does not grant, and nothing else', async (role) => {
  const user = USER_OF[role];
  const { publish, subscribe } = permissionsOf(role);
  const mayPublish = (subject: string): boolean => publish.some((pattern) => matches(pattern, subject));
  const maySubscribe = (subject: string): boolean =>
    [...subscribe, `_INBOX.${user}.>`].some((pattern) => matches(pattern, subject));
  const forbiddenToPublish = EVERYTHING.filter((subject) => !mayPublish(subject));
  const forbiddenToSubscribe = EVERYTHING.filter((subject) => !maySubscribe(subject));
  expect(forbiddenToPublish.length).toBeGreaterThan(EVERYTHING.length / 5);
  expect(forbiddenToSubscribe.length).toBeGreaterThan(EVERYTHING.length / 2);

  const publisher = await login(user);
  const refusedPublishes = await refusals(publisher, () => {
    for (const subject of EVERYTHING) publisher.publish(subject);
  });
  expect([...refusedPublishes].sort()).toEqual([...forbiddenToPublish].sort());
  const subscriber = await login(user);
  const refusedSubscriptions = await refusals(subscriber, () => {
    for (const subject of EVERYTHING) subscriber.subscribe(subject, { callback: () => undefined });
  });
  expect([...refusedSubscriptions].sort()).toEqual([...forbiddenToSubscribe].sort());
});

test.each<[Role, 'publish' | 'subscribe', string]>([
  ['attention-shard', 'publish', SUBJECTS.generate],
  ['attention-shard', 'publish', SUBJECTS.work('k', 'x')],
  ['attention-shard', 'publish', SUBJECTS.tokens('x')],
  ['attention-shard', 'publish', SUBJECTS.shardTensors('other')],
  ['attention-shard', 'publish', ENDPOINTS.allocate.subject],
  ['attention-shard', 'publish', '$JS.API.INFO'],
  ['attention-shard', 'subscribe', SUBJECTS.tokens('x')],
  ['attention-shard', 'subscribe', SUBJECTS.workerTensors('x', 0, 0)],
  ['kv-manager', 'publish', SUBJECTS.shardTensors('x')],
  ['kv-manager', 'subscribe', SUBJECTS.generate],
  ['gateway', 'publish', SUBJECTS.shardTensors('x')],
  ['gateway', 'publish', ENDPOINTS.free.subject],
  ['dense-executor', 'subscribe', SUBJECTS.generate],
  ['dense-executor', 'publish', SUBJECTS.work('k', 'x')],
  ['client', 'subscribe', '>'],
  ['client', 'subscribe', '_INBOX.>'],
  ['client', 'subscribe', '_INBOX.bob.>'],
  ['client', 'subscribe', SUBJECTS.tokens('*')],
  ['client', 'subscribe', SUBJECTS.cancel('*')],
  ['client', 'publish', SUBJECTS.tokens('x')],
  ['client', 'publish', SUBJECTS.work('k', 'x')],
  ['client', 'publish', '_INBOX.bob.x'],
  ['client', 'publish', `$JS.API.STREAM.MSG.GET.${STREAMS.tokens.name}`],
  ['client', 'publish', `$JS.API.CONSUMER.CREATE.${STREAMS.tokens.name}`],
  ['durable-client', 'publish', SUBJECTS.tokens('x')],
  ['durable-client', 'publish', `$JS.API.STREAM.MSG.GET.${STREAMS.work.name}`],
  ['durable-client', 'publish', `$JS.API.STREAM.PURGE.${STREAMS.tokens.name}`],
  ['operator', 'publish', SUBJECTS.shardTensors('x')],
  ['operator', 'subscribe', '>'],
])('a %s cannot %s %s', async (role, verb, subject) => {
  const connection = await login(USER_OF[role]);
  const refused = await refusals(connection, () => {
    if (verb === 'publish') connection.publish(subject);
    else connection.subscribe(subject, { callback: () => undefined });
  });
  expect([...refused]).toEqual([subject]);
});

test('a connection without a user sees its own inboxes and no inbox of a user', async () => {
  const [anonymous, gateway] = [await login(), await login('gateway')];
  const seen: string[] = [];
  anonymous.subscribe('_INBOX.>', { callback: (_, message) => void seen.push(message.subject) });
  await anonymous.flush();
  for (const subject of ['_INBOX.alice.x', '_INBOX.kv-manager.x', '_INBOX.abc', '_INBOX.abc.d'])
    gateway.publish(subject);
  await gateway.flush();
  await anonymous.flush();
  expect(seen).toEqual(['_INBOX.abc', '_INBOX.abc.d']);
});

test('a wrong password and an unknown user are refused at once, with what to set', async () => {
  const wrong = connect({ servers: server.url, user: 'gateway', pass: 'guess', reconnect: false });
  await expect(wrong).rejects.toMatchObject({ code: 'AUTHORIZATION_VIOLATION' });
  const access = { user: 'gateway', passwordFile: join(directory, 'alice', 'password') };
  const startMs = performance.now();
  const refused = Bus.connect(
    { url: server.url, name: 'test', connectTimeoutMs: 5_000, access },
    { onError: () => {} },
  );
  await expect(refused).rejects.toMatchObject({
    code: 'nats_unreachable',
    message: expect.stringMatching(/refuses the user "gateway"; set LAMINA_NATS_USER and LAMINA_NATS_PASSWORD_FILE/),
  });
  expect(performance.now() - startMs).toBeLessThan(3_000);
  const missing = { user: 'gateway', passwordFile: join(directory, 'nowhere') };
  await expect(
    Bus.connect({ url: server.url, name: 'test', connectTimeoutMs: 5_000, access: missing }, { onError: () => {} }),
  ).rejects.toMatchObject({ code: 'config_invalid', message: expect.stringContaining('nowhere') });
});

test('a process that connects as another service is told so', async () => {
  const access = { user: 'attention-shard', passwordFile: directory };
  const bus = await Bus.connect(
    { url: server.url, name: 'test', connectTimeoutMs: 5_000, access },
    { onError: () => {} },
  );
  await expect(bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 })).rejects.toMatchObject({
    code: 'config_invalid',
    message: expect.stringContaining(ENDPOINTS.kvStatus.subject),
  });
  await bus.close();
});

test('passwords are kept from run to run, and are nobody else’s to read', async () => {
  const before = passwordOf('gateway');
  const usersFile = await writeNatsUsers(directory, { clients: [], anonymous: null });
  expect(passwordOf('gateway')).toBe(before);
  expect(readFileSync(usersFile, 'utf8')).not.toContain('no_auth_user');
  for (const file of [usersFile, join(directory, 'gateway', 'password')])
    expect(statSync(file).mode & 0o777).toBe(0o600);
  await expect(
    writeNatsUsers(directory, { clients: [{ name: 'a.b', role: 'client' }], anonymous: null }),
  ).rejects.toMatchObject({ code: 'config_invalid' });
  await expect(
    writeNatsUsers(directory, { clients: [{ name: 'gateway', role: 'client' }], anonymous: null }),
  ).rejects.toMatchObject({ code: 'config_invalid' });
});
