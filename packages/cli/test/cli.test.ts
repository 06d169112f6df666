import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Child } from '../src/child.ts';
import { describeAnswer, describeShards } from '../src/demo.ts';
import { requireFreePort } from '../src/nats-process.ts';
import { clusterOptionsOf } from '../src/options.ts';

const PORTS = { natsPort: 0, httpPort: 0 };
const FLAGS = { attentionShards: 2, denseExecutors: 1 };

function shell(script: string): Child {
  return new Child({ name: 'gateway', command: '/bin/sh', args: ['-c', script], environment: {} });
}

test('a service that cannot start is quoted with its code, all lines of it', async () => {
  const child = shell(`echo '{"level":30}' >&2; printf 'lamina gateway: one\\ntwo [config_invalid]\\n' >&2; exit 1`);
  expect(await child.ended).toMatchObject({ code: 'config_invalid', message: 'gateway: one\ntwo' });
});

test('a process that dies without a word is reported with its status and its log', async () => {
  expect(await shell('echo hello >&2; exit 3').ended).toMatchObject({
    code: 'internal',
    message: 'gateway ended with status 3',
    diagnostics: { log: ['hello'] },
  });
  const missing = new Child({ name: 'x', command: '/nonexistent/binary', args: [], environment: {} });
  expect((await missing.ended).message).toContain('could not be started');
});

test('a child that ignores SIGTERM is killed after its grace', async () => {
  const child = shell(`trap '' TERM; echo up; while :; do sleep 0.05; done`);
  while (child.log.length === 0) await new Promise((resolve) => setTimeout(resolve, 10));
  await child.stop(100);
  expect(child.isRunning).toBe(false);
});

test('what a killed launcher leaves behind is removed', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'lamina-janitor-'));
  const janitor = new URL('../dist/janitor.js', import.meta.url).href;
  const orphan = spawn('sleep', ['60']);
  const ended = once(orphan, 'exit');
  const launcher = spawn(process.execPath, [
    '--input-type=module',
    '-e',
    `import { Janitor } from '${janitor}'; const janitor = new Janitor();
     janitor.watch(${orphan.pid}); janitor.own(${JSON.stringify(directory)});
     setTimeout(() => process.kill(process.pid, 'SIGKILL'), 100); setInterval(() => {}, 1000);`,
  ]);
  await once(launcher, 'exit');
  await ended;
  for (let tries = 0; existsSync(directory) && tries < 100; tries++) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  expect(existsSync(directory)).toBe(false);
});

test('a taken port is said before anything starts', async () => {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const address = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : 0;
  await expect(requireFreePort(port, 'NATS', '--nats-port')).rejects.toMatchObject({ code: 'address_in_use' });
  server.close();
  await once(server, 'close');
  await requireFreePort(port, 'NATS', '--nats-port');
  await requireFreePort(0, 'NATS', '--nats-port');
});

test('flags win over variables, and variables over defaults', async () => {
  const environment = { LAMINA_HTTP_PORT: '9000', LAMINA_MODEL: '/models/a', LAMINA_NATS_SERVER: '/opt/nats-server' };
  expect(await clusterOptionsOf(FLAGS, PORTS, {})).toMatchObject({
    httpPort: 0,
    natsServer: 'nats-server',
    natsUrl: undefined,
  });
  expect(await clusterOptionsOf(FLAGS, PORTS, environment)).toMatchObject({
    httpPort: 9000,
    natsServer: '/opt/nats-server',
    settings: { model: '/models/a' },
  });
  expect(await clusterOptionsOf({ ...FLAGS, httpPort: 1, model: '/b' }, PORTS, environment)).toMatchObject({
    httpPort: 1,
    settings: { model: '/b' },
  });
  await expect(clusterOptionsOf(FLAGS, PORTS, { LAMINA_HTP_PORT: '1' })).rejects.toThrow('LAMINA_HTP_PORT');
  await expect(clusterOptionsOf({ ...FLAGS, natsPort: 1, natsUrl: 'nats://x' }, PORTS, {})).rejects.toThrow('not both');
});

test('the table has a row per shard and its part of the attention', () => {
  const shard = (shardId: string, usedBlocksPeak: number, tokensAttended: number) => ({
    shardId,
    kernel: 'native',
    numBlocks: 64,
    usedBlocksPeak,
    tokensAttended,
  });
  expect(describeShards([shard('shard-b', 1, 25), shard('shard-a', 3, 75)]).split('\n')).toEqual([
    'attention shard   kernel   blocks held   part of the attention',
    'shard-a           native   3 of 64       75 %',
    'shard-b           native   1 of 64       25 %',
  ]);
  expect(describeShards([shard('shard-a', 0, 0)])).toContain(' -');
  expect(describeAnswer({ tokens: 1, timeToFirstTokenMs: 10, tokensPerSecond: null, finishReason: 'stop' })).toBe(
    '1 tokens (stop), first token after 10 ms',
  );
});
