/**
 * A whole cluster whose processes have a NATS user each, over TLS: it answers exactly, nobody needs what it may not do,
 * and no secret is in a log.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Bus } from '@lamina/bus';
import { ROOT_DIRECTORY, writeNatsUsers } from '@lamina/cli';
import { decodeTokens, ENDPOINTS, SERVICE_NAMES } from '@lamina/protocol';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { connect } from 'nats';
import { expect, onTestFinished, test } from 'vitest';
import { startForTest } from '../cluster.ts';

const REQUEST = { prompt: 'Once upon a time', temperature: 0, max_tokens: 20, ignore_eos: true };

function secretsIn(directory: string): string[] {
  return readdirSync(directory)
    .filter((user) => user !== 'nats')
    .map((user) => readFileSync(join(directory, user, 'password'), 'utf8').trim());
}

test('a cluster of its own users asks for nothing that it may not do, and logs no password', async () => {
  const lines: string[] = [];
  const tested = await startForTest({ settings: { logLevel: 'trace' }, onLine: (_, line) => void lines.push(line) });
  const { cluster } = tested;
  const answer = await tested.generate(REQUEST);
  expect(answer.at(-1)).toMatchObject({ finish_reason: 'length', index: 19 });
  await tested.addShard();
  await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
  // Any client, without credentials and code of ours, as the README shows it.
  const client = await connect({ servers: cluster.natsUrl });
  const texts: string[] = [];
  for await (const reply of await client.requestMany('lamina.v1.generate', JSON.stringify(REQUEST), {
    maxWait: 20_000,
  })) {
    texts.push(...decodeTokens(reply.data).map(({ text }) => text));
    if (reply.headers?.get('Lamina-Final') === 'true') break;
  }
  expect(texts.join('')).toBe(answer.map(({ text }) => text).join(''));
  await expect(client.request(ENDPOINTS.kvStatus.subject, new Uint8Array(), { timeout: 2_000 })).rejects.toMatchObject({
    code: 'PERMISSIONS_VIOLATION',
  });
  await client.close();
  const secrets = secretsIn(cluster.passwords!);
  expect(secrets).toHaveLength(5);
  await tested.stop();
  const log = lines.join('\n');
  expect(lines.length).toBeGreaterThan(20);
  // The one refusal is that of the client above: nats-server logs each with the name of the connection.
  const refusals = lines.filter((line) => /(permissions|publish|subscription) violation/i.test(line));
  expect(refusals.length).toBeGreaterThan(0);
  const isExpected = (line: string): boolean =>
    /user:anonymous|User "anonymous"/i.test(line) && line.includes(`Subject "${ENDPOINTS.kvStatus.subject}"`);
  expect(refusals.filter((line) => !isExpected(line))).toEqual([]);
  for (const secret of secrets) expect(log).not.toContain(secret);
}, 60_000);

test('a cluster runs over TLS, and nothing runs without it', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'lamina-tls-'));
  onTestFinished(() => rmSync(directory, { recursive: true, force: true }));
  const certificates = join(directory, 'certificates');
  execFileSync(join(ROOT_DIRECTORY, 'deploy', 'make-certificates.sh'), [certificates, 'localhost', '127.0.0.1']);
  const users = join(directory, 'users');
  const usersFile = await writeNatsUsers(users, { clients: [], anonymous: null });
  const nats = await startNatsServer({
    configuration: [
      readFileSync(usersFile, 'utf8'),
      `tls { cert_file: "${certificates}/server.pem", key_file: "${certificates}/server-key.pem" }`,
    ].join('\n'),
  });
  onTestFinished(() => nats.stop());
  const natsTlsCaFile = join(certificates, 'ca.pem');
  const natsUrl = nats.url.replace('nats://', 'tls://');
  const settings = { natsPasswordFile: users, natsTlsCaFile };
  const tested = await startForTest({ natsUrl, settings });
  expect((await tested.generate(REQUEST)).at(-1)).toMatchObject({ finish_reason: 'length', index: 19 });
  const health = execFileSync(
    process.execPath,
    [join(ROOT_DIRECTORY, 'packages', 'cli', 'dist', 'main.js'), 'healthcheck', 'attention-shard'],
    {
      env: {
        PATH: process.env.PATH,
        LAMINA_NATS_URL: natsUrl,
        LAMINA_NATS_PASSWORD_FILE: users,
        LAMINA_NATS_TLS_CA_FILE: natsTlsCaFile,
      },
      encoding: 'utf8',
    },
  );
  expect(health).toBe('');
  const instances = await tested.cluster.bus.serviceStats(SERVICE_NAMES['attention-shard'], 500);
  expect(instances).toHaveLength(2);

  const events = { onError: (): void => undefined };
  const options = { url: natsUrl, name: 'test', connectTimeoutMs: 500 };
  // Without the authority's certificate the server could be anybody.
  await expect(Bus.connect({ ...options, access: { user: 'operator', passwordFile: users } }, events)).rejects.toThrow(
    /certificate/i,
  );
  await expect(Bus.connect({ ...options, access: { user: 'x', tlsCaFile: natsTlsCaFile } }, events)).rejects.toThrow(
    /refuses a process without a password/,
  );
  await expect(
    Bus.connect({ ...options, access: { user: 'x', tlsCaFile: join(directory, 'no.pem') } }, events),
  ).rejects.toMatchObject({ code: 'config_invalid', message: expect.stringContaining('no.pem') });
  // A server without TLS is not spoken to in clear.
  const plain = await startNatsServer();
  onTestFinished(() => plain.stop());
  await expect(
    Bus.connect({ ...options, url: plain.url, access: { user: 'x', tlsCaFile: natsTlsCaFile } }, events),
  ).rejects.toMatchObject({ code: 'nats_unreachable' });
}, 60_000);
