/**
 * Owns the users of a nats-server: their passwords on disk and the part of its configuration that names them.
 *
 * Invariants
 * 1. A password is made once; a later run keeps it, so that running services need no restart. They are random, 32 bytes.
 * 2. Files are written before anyone may read them: mode 0600 in directories of mode 0700.
 * 3. Permissions come from the table of subjects; nothing is granted here but the user's own inbox.
 */
import { randomBytes } from 'node:crypto';
import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { idSchema, inboxPrefixOf, permissionsOf, type Role } from '@lamina/protocol';
import { SERVICES } from '@lamina/runtime/config';
import { LaminaError } from '@lamina/tensor';

export interface NatsUser {
  readonly name: string;
  readonly role: Role;
}

export interface NatsUsersOptions {
  /** Besides the services and the operator. */
  readonly clients: readonly NatsUser[];
  /** What a connection without a user may do; null refuses it. */
  readonly anonymous: 'client' | 'durable-client' | null;
}

/** The user whose permissions connections without one have. */
const ANONYMOUS = 'anonymous';
const PASSWORD_BYTES = 32;

const SYSTEM_USERS: readonly NatsUser[] = [...SERVICES, 'operator' as const].map((role) => ({ name: role, role }));

const list = (subjects: readonly string[]): string =>
  `[${subjects.map((subject) => JSON.stringify(subject)).join(', ')}]`;

function permissionLines(role: Role, inboxes: readonly string[], deniedInboxes: readonly string[]): string {
  const { publish, subscribe } = permissionsOf(role);
  const denied = deniedInboxes.length === 0 ? '' : `, deny: ${list(deniedInboxes)}`;
  return `{ publish: { allow: ${list(publish)} }, subscribe: { allow: ${list([...inboxes, ...subscribe])}${denied} } }`;
}

/**
 * The part of nats-server's configuration that says who may do what.
 * @param passwords By user name.
 */
function renderNatsUsers(
  users: readonly NatsUser[],
  anonymous: NatsUsersOptions['anonymous'],
  passwords: ReadonlyMap<string, string>,
): string {
  const inboxOf = (user: string): string => `${inboxPrefixOf(user)}.>`;
  const line = (name: string, permissions: string): string =>
    `    { user: ${JSON.stringify(name)}, password: ${JSON.stringify(passwords.get(name))}, permissions: ${permissions} }`;
  const lines = users.map(({ name, role }) => line(name, permissionLines(role, [inboxOf(name)], [])));
  if (anonymous !== null) {
    // NATS clients that know nothing of users have their inboxes right under _INBOX.
    const others = users.map(({ name }) => inboxOf(name));
    lines.push(line(ANONYMOUS, permissionLines(anonymous, ['_INBOX.>'], others)));
  }
  return [
    '# Written by `lamina nats users`: one user per role, and what it may publish and subscribe.',
    'authorization {',
    '  timeout: 5',
    '  users: [',
    ...lines,
    '  ]',
    '}',
    ...(anonymous === null ? [] : [`no_auth_user: ${JSON.stringify(ANONYMOUS)}`]),
    '',
  ].join('\n');
}

async function passwordOf(directory: string, user: string): Promise<string> {
  const folder = join(directory, user);
  const file = join(folder, 'password');
  await mkdir(folder, { recursive: true, mode: 0o700 });
  try {
    const known = (await readFile(file, 'utf8')).trim();
    if (known !== '') return known;
  } catch (cause) {
    if (!(cause instanceof Error && 'code' in cause && cause.code === 'ENOENT')) throw cause;
  }
  const password = randomBytes(PASSWORD_BYTES).toString('base64url');
  await writeFile(file, `${password}\n`, { mode: 0o600 });
  return password;
}

/**
 * Writes `<directory>/<user>/password` for every user and `<directory>/nats/users.conf` for the server.
 * Returns the path of the latter.
 * @throws LaminaError `config_invalid` for a user name that is taken or no subject token.
 */
export async function writeNatsUsers(directory: string, options: NatsUsersOptions): Promise<string> {
  const users = [...SYSTEM_USERS, ...options.clients];
  const names = new Set<string>([ANONYMOUS, 'nats']);
  for (const { name } of users) {
    if (!idSchema.safeParse(name).success || names.has(name)) {
      throw new LaminaError(
        'config_invalid',
        `"${name}" cannot be the name of a user: it is taken, or not made of letters, digits, "-" and "_"`,
      );
    }
    names.add(name);
  }
  await mkdir(directory, { recursive: true, mode: 0o700 });
  const passwords = new Map<string, string>();
  for (const { name } of users) passwords.set(name, await passwordOf(directory, name));
  // Nobody logs in as this one; the server only needs it to have a password.
  if (options.anonymous !== null) passwords.set(ANONYMOUS, randomBytes(PASSWORD_BYTES).toString('base64url'));
  const folder = join(directory, 'nats');
  await mkdir(folder, { recursive: true, mode: 0o700 });
  const file = join(folder, 'users.conf');
  await writeFile(file, renderNatsUsers(users, options.anonymous, passwords), { mode: 0o600 });
  await chmod(file, 0o600);
  return file;
}
