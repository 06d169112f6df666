/**
 * Owns who may publish and subscribe what: the roles of NATS users and the permissions of each, derived from the table of
 * subjects (`from` publishes, `to` subscribes) and from what each role does with a stream.
 *
 * Invariants
 * 1. A subject's permissions stand nowhere else: a new entry of the table has its permissions, and a party that the table
 *    names and this file does not know fails at load.
 * 2. Every user has an inbox of its own, `_INBOX.<user>.>`; only services may publish to inboxes, so nobody else can answer.
 * 3. No role but the operator reaches a JetStream call that it does not use, nor one of a stream that it does not use.
 * 4. `allow_responses` is not used: it would let a client choose, as the reply of its request, a subject that the service
 *    may not publish on, such as a call that empties a stream.
 * 5. A client has no call that the server answers with more than it was asked with: it could name a subject of answers as the
 *    reply, have the stream store what it is told, and push out what others are still to read.
 * 6. Who reads a stream is pushed its messages: a pull (`CONSUMER.MSG.NEXT`) and an acknowledgement (`$JS.ACK`) are answered by
 *    the server with an empty message on a reply subject of the caller's choice, which is all that `STREAM.DELETE` asks for.
 */
import { LaminaError } from '@lamina/tensor';
import { ENDPOINTS, EVENTS, SERVICE_NAMES, type ServiceName, STREAMS, SUBJECT_NOTES } from './subjects.ts';

/**
 * client: prompts and cancels, its answers come to its own inbox. durable-client: also durable prompts and every stored
 * answer. operator: what a client may, the state of the cluster, and the administration of the streams.
 */
export const ROLES = [
  'client',
  'durable-client',
  'gateway',
  'dense-executor',
  'attention-shard',
  'kv-manager',
  'operator',
] as const;
export type Role = (typeof ROLES)[number];

/** What a NATS user may do: subjects with wildcards, each list sorted. */
export interface Permissions {
  readonly publish: readonly string[];
  readonly subscribe: readonly string[];
}

const SERVICE_ROLES = Object.keys(SERVICE_NAMES).filter((name): name is ServiceName =>
  Object.hasOwn(SERVICE_NAMES, name),
);

/** The roles behind a name in the columns `from` and `to`. */
const PARTIES: Readonly<Record<string, readonly Role[]>> = {
  client: ['client', 'durable-client', 'operator'],
  gateway: ['gateway'],
  'gateway (queue group)': ['gateway'],
  'dense-executor': ['dense-executor'],
  'attention-shard': ['attention-shard'],
  'kv-manager': ['kv-manager'],
  cli: ['operator'],
  'every service': SERVICE_ROLES,
  anyone: ['durable-client', 'operator', ...SERVICE_ROLES],
};

/**
 * manage: create and adjust it and its durable consumer. publish: store. consume: take from the durable consumer,
 * acknowledge, and replace a consumer that is stuck. look: one message, and how many wait. read: be pushed it. follow: its
 * messages as they are published.
 */
type StreamUse = 'manage' | 'publish' | 'consume' | 'look' | 'read' | 'follow';

const STREAM_USES: Readonly<Record<keyof typeof STREAMS, Readonly<Partial<Record<Role, readonly StreamUse[]>>>>> = {
  prompts: {
    gateway: ['manage', 'consume', 'look'],
    'dense-executor': ['manage'],
    'durable-client': ['publish'],
    operator: ['publish'],
  },
  work: {
    gateway: ['manage', 'publish', 'look'],
    'dense-executor': ['manage', 'consume'],
  },
  tokens: {
    gateway: ['manage', 'publish', 'look', 'read', 'follow'],
    'dense-executor': ['manage', 'publish', 'look', 'read'],
    'durable-client': ['read', 'follow'],
    operator: ['read', 'follow'],
  },
};

const JETSTREAM_KIND = /^JetStream /;
const API = '$JS.API';
const INBOXES = '_INBOX.>';

/** Where the answers to requests of a user go. */
export function inboxPrefixOf(user: string): string {
  return `_INBOX.${user}`;
}

class Grants {
  readonly publish = new Set<string>();
  readonly subscribe = new Set<string>();

  sorted(): Permissions {
    return { publish: [...this.publish].sort(), subscribe: [...this.subscribe].sort() };
  }
}

function rolesOf(parties: string): readonly Role[] {
  return parties.split(', ').flatMap((party) => {
    const roles = PARTIES[party];
    if (roles === undefined) throw new LaminaError('internal', `no NATS role is known for "${party}"`);
    return roles;
  });
}

function grantStream(grants: Grants, stream: (typeof STREAMS)[keyof typeof STREAMS], use: StreamUse): void {
  const { name, subjects, durableConsumer } = stream;
  const { publish, subscribe } = grants;
  const call = (...calls: readonly string[]): void => {
    for (const each of [`${API}.INFO`, ...calls.map((tail) => `${API}.${tail}`)]) publish.add(each);
  };
  switch (use) {
    case 'manage':
      call(`STREAM.INFO.${name}`, `STREAM.CREATE.${name}`, `STREAM.UPDATE.${name}`);
      if (durableConsumer !== null) {
        call(`CONSUMER.CREATE.${name}.${durableConsumer}`, `CONSUMER.DURABLE.CREATE.${name}.${durableConsumer}`);
        call(`CONSUMER.INFO.${name}.${durableConsumer}`);
      }
      break;
    case 'publish':
      for (const subject of subjects) publish.add(subject);
      break;
    case 'consume':
      call(`CONSUMER.INFO.${name}.${durableConsumer}`, `CONSUMER.MSG.NEXT.${name}.${durableConsumer}`);
      // Made anew when it does not offer what the stream has.
      call(`CONSUMER.DELETE.${name}.${durableConsumer}`);
      // What is acknowledged again must be what it was.
      call(`STREAM.INFO.${name}`, `STREAM.MSG.GET.${name}`);
      publish.add(`$JS.ACK.${name}.${durableConsumer}.>`);
      break;
    case 'look':
      call(`STREAM.INFO.${name}`, `STREAM.MSG.GET.${name}`);
      if (durableConsumer !== null) call(`CONSUMER.INFO.${name}.${durableConsumer}`);
      break;
    case 'read':
      call('STREAM.NAMES', `CONSUMER.CREATE.${name}`, `CONSUMER.CREATE.${name}.>`, `CONSUMER.DELETE.${name}.*`);
      publish.add(`$JS.FC.${name}.>`);
      break;
    case 'follow':
      for (const subject of subjects) subscribe.add(subject);
  }
}

function grantsOf(role: Role): Grants {
  const grants = new Grants();
  const subjects = [
    ...Object.values(ENDPOINTS),
    ...Object.values(EVENTS),
    ...SUBJECT_NOTES.filter(({ kind }) => !JETSTREAM_KIND.test(kind)),
  ];
  for (const { subject, from, to } of subjects) {
    const pattern = subject.replaceAll(/<[^>]+>/g, '*');
    if (rolesOf(from).includes(role)) grants.publish.add(pattern);
    if (rolesOf(to).includes(role)) grants.subscribe.add(pattern);
  }
  for (const [key, uses] of Object.entries(STREAM_USES)) {
    const stream = Object.entries(STREAMS).find(([name]) => name === key)?.[1];
    if (stream !== undefined) for (const use of uses[role] ?? []) grantStream(grants, stream, use);
  }
  const service = SERVICE_ROLES.find((name) => name === role);
  if (service !== undefined) {
    const name = SERVICE_NAMES[service];
    for (const subject of ['$SRV.*', `$SRV.*.${name}`, `$SRV.*.${name}.*`]) grants.subscribe.add(subject);
    // Its own health check asks for the instances of the service.
    grants.publish.add(`$SRV.STATS.${name}`).add(INBOXES);
  }
  if (role === 'durable-client' || role === 'operator') grants.publish.add('$SRV.>');
  if (role === 'operator') grants.publish.add(`${API}.>`);
  return grants;
}

/** What a role may do, inboxes left out. */
export function permissionsOf(role: Role): Permissions {
  return grantsOf(role).sorted();
}
